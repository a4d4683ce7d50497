# Copyright 2026 The memcontrol_hf authors
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Make the demo that ships in the package again: data set, image encoder, autoencoder, UNet and text encoder.

```bash
npm install --prefix DIR emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0 @lobehub/fluent-emoji-3d@1.1.0
OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 training_scripts/pretrain_demo_base.py --npm_dir DIR/node_modules
```

The processes share the batch of the UNet: on two cores two processes are nearly twice as fast as one with two threads.
The stages before the UNet run in one process, on all cores.

Each stage leaves a checkpoint in `--output_dir`, so the same command goes on where it stopped. The last stage writes
the demo folder. The stages are in `demo_base/`:

1. `emoji`: emoji of three vendors as 64x64 images over white, with names as captions; three splits of Fluent emoji,
2. `image_encoder`: a small ResNet, trained to tell every image from every other (NT-Xent),
3. `autoencoder`: 64x64 images -> 8x8 latents, on all images but the downstream splits,
4. `denoiser`: the UNet and the text encoder, on Noto emoji and their names alone,
5. `finished`: the demo folder is written, read back and measured.
"""

import argparse
import json
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import StableDiffusionPipeline

from demo_base.autoencoder import train_decoder, train_vae
from demo_base.denoiser import make_scheduler, train_unet
from demo_base.emoji import load_data, to_tensor
from demo_base.finished import measure_demo, save_demo
from demo_base.image_encoder import train_encoder
from memcontrol_hf.whole_files import write_whole

SETTINGS = ("seed", "encoder_steps", "vae_steps", "decoder_steps", "unet_steps")
"""Flags that decide what the checkpoints are of."""
DEMO_DIR = Path(__file__).parent.parent / "memcontrol_hf" / "demo"


def parse_args() -> argparse.Namespace:
    """The flags; checkpoints of other settings are refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--npm_dir", type=Path, required=True, help="node_modules folder with the three packages")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo_base"), help="folder of the checkpoints")
    parser.add_argument("--demo_dir", type=Path, default=DEMO_DIR, help="folder that the finished demo is written to")
    parser.add_argument("--encoder_steps", type=int, default=300, help="steps of the image encoder (default: 300)")
    parser.add_argument("--vae_steps", type=int, default=1000, help="steps of the autoencoder (default: 1000)")
    parser.add_argument(
        "--decoder_steps", type=int, default=1500, help="further steps of the decoder alone (default: 1500)"
    )
    parser.add_argument("--unet_steps", type=int, default=8000, help="steps of UNet and text encoder (default: 8000)")
    parser.add_argument(
        "--checkpointing_steps", type=int, default=200, help="steps between checkpoints (default: 200)"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed of splits and training (default: 0)")
    args = parser.parse_args()
    settings = {name: value for name, value in vars(args).items() if name in SETTINGS}
    file = args.output_dir / "settings.json"
    if file.exists() and (before := json.loads(file.read_text())) != settings:
        parser.error(f"the checkpoints in {args.output_dir} are of {before}: give another --output_dir")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(settings))
    return args


def main() -> None:
    """Run the stages, then write and measure the demo."""
    args = parse_args()
    workers, threads = PartialState(cpu=True, timeout=timedelta(days=1)), torch.get_num_threads()
    parts = load_data(args.npm_dir, args.seed)
    libraries = ("torch", "diffusers", "transformers", "tokenizers", "datasets")
    log: dict[str, Any] = {
        "seed": args.seed,
        "processes": workers.num_processes,
        "packages": {name: version(name) for name in libraries},
        "images": {name: len(rows) for name, rows in parts.items()},
    }
    pixels = to_tensor(parts["noto"] + parts["noto_held_out"] + parts["twemoji"] + parts["fluent_rest"])
    with workers.main_process_first():  # the other processes find its checkpoints
        torch.set_num_threads(threads * workers.num_processes)
        encoder = train_encoder(pixels, args, log)
        vae = train_vae(pixels, encoder, args, log)
        train_decoder(vae, encoder, pixels, args, log)
        torch.set_num_threads(threads)
    unet, text_encoder, tokenizer = train_unet(parts, vae, args, log)
    if not workers.is_main_process:
        return
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    save_demo(pipe, encoder, parts, args.demo_dir)
    log["measured"] = measure_demo(args.demo_dir, parts)
    log_file = args.demo_dir / "training_log.json"
    suffixes = (".safetensors", ".json", ".parquet", ".png")
    files = [path for path in args.demo_dir.rglob("*") if path.suffix in suffixes and path != log_file]
    log["bytes"] = {path.relative_to(args.demo_dir).as_posix(): path.stat().st_size for path in sorted(files)}
    log_file.write_text(json.dumps(log, indent=2) + "\n")
    print(json.dumps(log["measured"], indent=2))


if __name__ == "__main__":
    main()
