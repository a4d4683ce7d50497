"""Unconditional models over pixels."""

from diffusers.training_utils import compute_snr

from .base import Family, check_only_resolution
from .noise import DDPMNoise


class UnconditionalNoise(DDPMNoise):
    """DDPM noise; where the denoiser predicts the image, a loss weighs as much as the signal-to-noise ratio."""

    def loss_weights(self, timesteps, snr_gamma=None):
        if snr_gamma is None and self.scheduler.config.prediction_type == "sample":
            return compute_snr(self.scheduler, timesteps)
        return super().loss_weights(timesteps, snr_gamma)


class UnconditionalFamily(Family):
    """DDPM and DDIM: a UNet over pixels, without a condition; captions are not read.

    The training follows diffusers' `train_unconditional.py`: timesteps are drawn uniformly, and all losses weigh
    alike, except where the image itself is predicted ([`UnconditionalNoise`]). For a model of one channel, an image is
    the mean of its three channels.
    """

    pipeline_classes = ("DDPMPipeline", "DDIMPipeline")
    denoiser_name = "unet"
    encoders = ()
    conditions = ()
    guided_passes = 1
    not_applicable = {
        **dict.fromkeys(("noise_norm", "clid"), "an unconditional model has no condition to leave out"),
        "embedding_attack": "an unconditional model has no embedding that can be searched",
    }
    noise_class = UnconditionalNoise
    pixels_per_latent = 1

    def __init__(self, pipeline):
        super().__init__(pipeline)
        if self.latent_channels not in (1, 3):
            raise ValueError(f"the UNet reads images of {self.latent_channels} channels, but only 1 or 3 can be given")

    @property
    def latent_channels(self):
        return self.denoiser.config.in_channels

    def check_resolution(self, resolution):
        check_only_resolution(resolution, self.trained_at)

    def cache_key(self):
        return [type(self).__name__, self.latent_channels]

    def encode_images(self, pixels):
        if self.latent_channels == 1:
            pixels = pixels.mean(1, keepdim=True)
        return pixels * 2 - 1

    def encode(self, prompts):
        return ()

    def null_condition(self):
        return None

    def meta_condition(self):
        return {}

    def call_denoiser(self, denoiser, noisy, timesteps):
        return denoiser(noisy, timesteps, return_dict=False)[0]

    def pipeline_arguments(self, prompts, resolution, guidance_scale):
        return {"batch_size": len(prompts)}

    def sample(self, *args, **kwargs):
        images = super().sample(*args, **kwargs)
        return images.expand(-1, 3, -1, -1)
