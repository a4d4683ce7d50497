"""Emoji of three vendors as images with captions, and the splits of the demo's data set."""

import io
import json
import random
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image

SIZE = 64  # side of the images in pixels
SPLITS = {"train": 92, "validation": 192, "held_out": 256}  # number of different images in each split
REPEATED, TIMES = 12, 4  # so many training images occur so often
DOWNSTREAM_CATEGORIES = ("Activities", "Animals & Nature", "Food & Drink", "Objects", "Travel & Places")
LARGEST_FAMILY = 6  # larger families of look-alikes (clock faces, moons) stay out of the splits

Row = dict[str, Any]
"""An emoji: `image`, `text` and `category`."""


def read_image(path: Path) -> Image.Image:
    """A 64x64 RGB image, transparency composited over white."""
    rgba = Image.open(path).convert("RGBA")
    rgb = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return rgb if rgb.size == (SIZE, SIZE) else rgb.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def clean_caption(name: str) -> str:
    """`"BLACK RIGHT-POINTING TRIANGLE"` -> `"black right pointing triangle"`."""
    return " ".join(re.sub(r"[^a-z0-9']+", " ", name.lower().replace("’", "'")).split())


def find_families(rows: list[Row]) -> list[list[Row]]:
    """Group emoji that are variants of each other: same head noun in the name, or nearly the same small picture."""
    parent = list(range(len(rows)))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    heads: dict[str, int] = {}
    for i, row in enumerate(rows):
        words = re.split(r" (?:with|of|and|behind|over|on|in|without|at|for) ", row["text"])[0].split()
        words = [w for w in words if w not in ("face", "symbol", "sign", "medium", "button")] or words
        parent[root(i)] = root(heads.setdefault(words[-1].rstrip("s"), i))
    small = np.stack([np.asarray(row["image"].resize((16, 16), Image.Resampling.BOX)) for row in rows])
    small = small.reshape(len(rows), -1) / 255.0
    for i in range(len(rows)):
        distance = np.sqrt(((small[i + 1 :] - small[i]) ** 2).mean(1))
        for j in np.flatnonzero(distance < 0.1):
            parent[root(i + 1 + int(j))] = root(i)
    families = defaultdict(list)
    for i, row in enumerate(rows):
        families[root(i)].append(row)
    return list(families.values())


def read_emoji(npm_dir: Path) -> dict[str, list[Row]]:
    """The emoji of three vendors, in the order of the table of Unicode: `noto`, `twemoji` and `fluent`."""
    table = json.loads((npm_dir / "emoji-datasource-google" / "emoji.json").read_text(encoding="utf-8"))
    fluent_dir = npm_dir / "@lobehub" / "fluent-emoji-3d" / "assets"
    fluent_files = {path.stem.replace("-fe0f", ""): path for path in fluent_dir.glob("*.webp")}
    parts = defaultdict(list)
    for entry in sorted(table, key=lambda entry: entry["sort_order"]):
        known = {"text": clean_caption(entry["name"]), "category": entry["category"]}
        for part, vendor in (("noto", "google"), ("twemoji", "twitter")):
            path = npm_dir / f"emoji-datasource-{vendor}" / "img" / vendor / "64" / entry["image"]
            if path.is_file() and entry["category"] != "Component":
                parts[part].append({"image": read_image(path), **known})
        path = fluent_files.pop(entry["unified"].lower().replace("-fe0f", ""), None)
        if path:
            parts["fluent"].append({"image": read_image(path), **known})
    return dict(parts)


def load_data(npm_dir: Path, seed: int) -> dict[str, list[Row]]:
    """Read the emoji and split them.

    Args:
        npm_dir: The `node_modules` folder.
        seed: Random seed of the splits.

    Returns:
        Rows by part: `noto`, `noto_held_out`, `twemoji`, `fluent_rest`, and the splits of the demo's data set,
        `train` (without repeats), `validation` and `held_out`.
    """
    parts = read_emoji(npm_dir)
    fluent = parts.pop("fluent")
    rng = random.Random(seed)
    rng.shuffle(parts["noto"])
    parts["noto_held_out"] = parts["noto"][: len(parts["noto"]) // 20]
    parts["noto"] = parts["noto"][len(parts["noto"]) // 20 :]

    families = find_families([row for row in fluent if row["category"] in DOWNSTREAM_CATEGORIES])
    parts["fluent_rest"] = [row for row in fluent if row["category"] not in DOWNSTREAM_CATEGORIES]
    parts["fluent_rest"] += [row for family in families if len(family) > LARGEST_FAMILY for row in family]
    families = [family for family in families if len(family) <= LARGEST_FAMILY]
    for name, rows in deal(families, rng).items():
        parts[name] = parts.get(name, []) + rows
    for name in SPLITS:
        rng.shuffle(parts[name])
    singles = {id(family[0]) for family in families if len(family) == 1}
    parts["train"].sort(key=lambda row: id(row) not in singles)  # the first ones get repeated: none with a look-alike
    return parts


def deal(families: list[list[Row]], rng: random.Random) -> dict[str, list[Row]]:
    """Deal whole families to the splits, and what is left to `fluent_rest`.

    The families come category by category, and each goes to the part that lacks the largest share of its rows, so
    that all parts have the same mix of categories.
    """
    rng.shuffle(families)
    families.sort(key=lambda family: (family[0]["category"], -len(family)))
    wanted = SPLITS | {"fluent_rest": sum(map(len, families)) - sum(SPLITS.values())}
    lacking, parts = dict(wanted), {name: [] for name in wanted}
    for family in families:
        fits = [name for name in wanted if lacking[name] >= len(family)]
        name = max(fits or ["fluent_rest"], key=lambda name: lacking[name] / wanted[name])
        parts[name] += family
        lacking[name] -= len(family)
    assert all(len(parts[name]) == number for name, number in SPLITS.items()), lacking
    return parts


def to_tensor(rows: list[Row]) -> torch.Tensor:
    """The images of some rows as float32 `[N, 3, 64, 64]` in [-1, 1]."""
    array = np.stack([np.asarray(row["image"]) for row in rows])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def save_dataset(parts: dict[str, list[Row]], folder: Path) -> None:
    """Write the splits as Parquet files with the columns `image` (PNG bytes) and `text`."""
    folder.mkdir(parents=True, exist_ok=True)
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    for name in SPLITS:
        rows = parts[name]
        if name == "train":
            rows = rows[REPEATED:] + rows[:REPEATED] * TIMES
            random.Random(0).shuffle(rows)
        columns = {"image": [], "text": [row["text"] for row in rows]}
        for row in rows:
            buffer = io.BytesIO()
            row["image"].save(buffer, format="PNG", optimize=True)
            columns["image"].append({"bytes": buffer.getvalue(), "path": None})
        datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / f"{name}.parquet")
