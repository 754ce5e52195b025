"""Fine-tuning as one call: a pretrained net and a folder of images in, a personal model out."""
