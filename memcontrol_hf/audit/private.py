"""Files of an audit that stay on this machine: a page of image pairs for a person to look through, and a key."""

import base64
import hashlib
import hmac
import io
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile

import torch
from datasets import DatasetDict
from jinja2 import Environment, StrictUndefined
from PIL import Image

from ..data import EncodedImages
from ..whole_files import write_whole
from .attacks import Attacked

_KEY_BYTES = 32


def private_folder(output_dir: Path) -> Path:
    """Make the folder of files that stay on this machine, and check before the long work that it can be written to.

    Raises:
        ValueError: when the folder cannot be written to.
    """
    private = output_dir / "private"
    try:
        private.mkdir(parents=True, exist_ok=True)
        private.chmod(0o700)
        TemporaryFile(dir=private).close()
    except OSError as error:
        raise ValueError(f"cannot write to the folder {str(private)!r}: {error.strerror}") from None
    return private


def fingerprint_key(folder: Path) -> bytes:
    """The key of fingerprints in a private folder, which is made if it is not there.

    Raises:
        ValueError: for a file that holds no key, such as one that a full disk cut short: without a key, everybody who
            has images could test whether they were used.
    """
    file = folder / "fingerprint.key"
    if not file.exists():
        write_whole(file, secrets.token_hex(_KEY_BYTES).encode())
    try:
        key = bytes.fromhex(file.read_text(encoding="ascii"))
    except ValueError:  # no ASCII, or no hexadecimal digits
        key = b""
    if len(key) != _KEY_BYTES:
        raise ValueError(
            f"{str(file)!r} holds no key of {2 * _KEY_BYTES} hexadecimal digits: put back what it held, or delete it, "
            "and the fingerprints of earlier audits can no longer be compared"
        )
    return key


def fingerprint(digests: Sequence[str], key: bytes) -> str:
    """A keyed hash of the training images. Nobody without the key can test whether a set of images was used.

    Args:
        digests (list of `str`): digests of the images; their order does not matter.
        key (`bytes`): what [`fingerprint_key`] gives.
    """
    return hmac.new(key, "".join(sorted(digests)).encode(), hashlib.sha256).hexdigest()


def write_review(result: Attacked, members: EncodedImages, path: Path) -> None:
    """Write a self-contained page: generated images beside their nearest training images, the most similar first.

    The page shows training images. Only people who may see these images may see the page, and it is never uploaded.
    """
    environment = Environment(undefined=StrictUndefined, autoescape=True)
    template = environment.from_string(Path(__file__).with_name("review_template.html").read_text(encoding="utf-8"))
    rows = [
        {
            "similarity": f"{similarity:.4f}",
            "generated": _data_uri(image),
            "training": _data_uri(original),
            "attacks": ", ".join(name for name, (found, _) in result.caught.items() if row in found),
        }
        for (similarity, row, image), original in zip(
            result.pairs, members.pixels([row for _, row, _ in result.pairs])
        )
    ]
    write_whole(path, template.render(pairs=rows).encode())


def write_split(data: DatasetDict, output_dir: Path) -> None:
    """Write the training images, with their canaries, and the held-out images to `private/split`.

    Canaries for which a coin was flipped are written, too: `canaries`, with the column `included`.

    `memcontrol audit --train private/split/train --held_out private/split/held_out` attacks exactly these again. An
    earlier split of the folder is replaced.

    Raises:
        ValueError: when the folder cannot be written to.
    """
    folder = private_folder(output_dir) / "split"
    shutil.rmtree(folder, ignore_errors=True)
    for name in data.keys() & {"train", "held_out", "canaries"}:
        data[name].save_to_disk(folder / name)
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o700 if path.is_dir() else 0o600)


def _data_uri(image: torch.Tensor) -> str:
    buffer = io.BytesIO()
    Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
