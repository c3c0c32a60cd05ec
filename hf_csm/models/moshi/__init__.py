"""Moshi: checkpoint, language model, codec, layout, LoRA, export, engine."""
