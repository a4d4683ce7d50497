"""The stages of pretrain_demo_base.py: data, image encoder, autoencoder, denoiser, and the finished demo."""
