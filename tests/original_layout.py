"""A pipeline of Stable Diffusion as one file in the layout that its authors published and that people share."""

import re
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
          "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}  # fmt: skip
UNET = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}  # fmt: skip
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def save_original(pipeline: StableDiffusionPipeline, file: Path) -> Path:
    """Write the UNet, the autoencoder and the CLIP text encoder of a pipeline into one file."""
    tensors = {f"model.diffusion_model.{_unet(k, pipeline.unet)}": t for k, t in pipeline.unet.state_dict().items()}
    for key, tensor in pipeline.vae.state_dict().items():
        name = _vae(key, len(pipeline.vae.config.block_out_channels))
        is_convolution = "attn_1" in name and tensor.dim() == 2  # attention was made of 1x1 convolutions
        tensors[f"first_stage_model.{name}"] = tensor[:, :, None, None] if is_convolution else tensor
    for key, tensor in pipeline.text_encoder.state_dict().items():
        tensors[f"cond_stage_model.transformer.text_model.{key}"] = tensor
    save_file({key: tensor.contiguous().to(torch.float32) for key, tensor in tensors.items()}, file)
    return file


def _unet(key: str, unet: torch.nn.Module) -> str:
    name, _, kind = key.rpartition(".")
    if name in UNET:
        return f"{UNET[name]}.{kind}"
    part, index, layers, layer, rest = re.match(r"(\w+?)_blocks?(?:\.(\d+))?\.(\w+)\.(\d+)\.(.+)", key).groups()
    layer, size = int(layer), unet.config.layers_per_block + 1
    if layers == "resnets":
        inner, _, kind = rest.rpartition(".")
        rest = f"{RESNET[inner]}.{kind}"
    if part == "mid":
        return f"middle_block.{2 * layer if layers == 'resnets' else 1}.{rest}"
    first = int(index) * size
    match layers:
        case "downsamplers":
            return f"input_blocks.{first + size}.0.op.{kind}"
        case "upsamplers":
            place = 2 if hasattr(unet.up_blocks[int(index)], "attentions") else 1
            return f"output_blocks.{first + size - 1}.{place}.conv.{kind}"
    place = 0 if layers == "resnets" else 1
    block = f"input_blocks.{first + layer + 1}" if part == "down" else f"output_blocks.{first + layer}"
    return f"{block}.{place}.{rest}"


def _vae(key: str, levels: int) -> str:
    name = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d+)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block", name)
    name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
    if match := re.match(r"(.+)\.mid_block\.attentions\.0\.(.+)\.(\w+)$", name):
        return f"{match[1]}.mid.attn_1.{VAE_ATTENTION[match[2]]}.{match[3]}"
    return name
