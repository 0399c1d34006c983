"""vitweave: woven vision encoders for Hugging Face transformers."""

from vitweave.auto import register

__version__ = "0.1.0"

register()
