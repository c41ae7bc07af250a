# SPDX-License-Identifier: Apache-2.0
"""The release's signature: an Ed25519 signature over the heads of its chains, by a key that stays with the owner.

``release.json`` lists the chains with their heads, ``release.sig`` holds the 64 bytes of the signature over it, and
``release.pub`` the public key. OpenSSL can check that as well::

    openssl pkeyutl -verify -pubin -inkey release.pub -rawin -in release.json -sigfile release.sig
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key

from monai_salm.release.manifest import SCHEMA, IntegrityError
from monai_salm.release.shards import MAX_SHARDS

ROOT = "release.json"
SIGNATURE = "release.sig"
PUBLIC_KEY = "release.pub"
SIGNED = (ROOT, SIGNATURE, PUBLIC_KEY)
_CHAIN = re.compile(r"(private/)?[a-z][a-z0-9-]*\.jsonl")
"""Names that chains may have: a forged list must not lead the check out of the folder."""


@dataclass(frozen=True)
class Chain:
    """A chain as it was when it was signed: its head and the number of its lines."""

    head: str
    lines: int


def sign(key: bytes, chains: Mapping[str, Chain], shards: int) -> dict[str, bytes]:
    """Files that sign a release, by name; the same for the same chains and key.

    Args:
        key: 32 secret bytes.
        chains: by path relative to the output folder.
        shards: processes that the writing was divided among.
    """
    content = {"schema": SCHEMA, "shards": shards, "chains": {name: asdict(chain) for name, chain in chains.items()}}
    root = (json.dumps(content, sort_keys=True, indent=1) + "\n").encode()
    private = Ed25519PrivateKey.from_private_bytes(key)
    return {ROOT: root, SIGNATURE: private.sign(root), PUBLIC_KEY: _pem(private.public_key())}


def read_signed(output_dir: Path, public_key: Path | None = None) -> tuple[dict[str, Chain], int, str]:
    """Chains that the owner signed, the number of shards, and the fingerprint of the key.

    Args:
        output_dir: the release.
        public_key: the owner's key, from a source that is trusted; else the key beside the files, which proves that
            they belong together but not whose they are.

    Raises:
        IntegrityError: When there is no signature, or it does not hold, or the key is another one.
        ValueError: When ``public_key`` is no Ed25519 key.
        OSError: When it cannot be read.
    """
    trusted = _load(public_key.read_bytes()) if public_key else None
    if public_key and trusted is None:
        raise ValueError(f"{public_key} holds no Ed25519 public key; name the {PUBLIC_KEY} that the owner gave you")
    for name in SIGNED:
        if (output_dir / name).is_symlink() or not (output_dir / name).is_file():
            raise IntegrityError(f"{name} is missing: the release is not finished, or was taken apart")
    root, signature, pem = ((output_dir / name).read_bytes() for name in SIGNED)
    key = _load(pem)
    if key is None or pem != _pem(key):
        raise IntegrityError(f"{PUBLIC_KEY} does not hold an Ed25519 public key alone: it was edited")
    if trusted is not None and _raw(trusted) != _raw(key):
        raise IntegrityError("the release was signed with another key than the one that you trust")
    try:
        key.verify(signature, root)
        content = json.loads(root)
        chains = {
            str(name): Chain(str(chain["head"]), int(chain["lines"])) for name, chain in content["chains"].items()
        }
        shards = int(content["shards"])
        if not 1 <= shards <= MAX_SHARDS or not all(map(_CHAIN.fullmatch, chains)):
            raise ValueError("no content of this version")
        return chains, shards, hashlib.sha256(_raw(key)).hexdigest()
    except InvalidSignature:
        raise IntegrityError(f"the signature does not hold: {ROOT} or {SIGNATURE} was edited") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise IntegrityError(f"{ROOT} was written by another version of monai-salm") from None


def _load(pem: bytes) -> Ed25519PublicKey | None:
    try:
        key = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm):
        return None
    return key if isinstance(key, Ed25519PublicKey) else None


def _pem(key: Ed25519PublicKey) -> bytes:
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def _raw(key: Ed25519PublicKey) -> bytes:
    return key.public_bytes(Encoding.Raw, PublicFormat.Raw)
