"""Deprecated home of `convert`, which is now `dit_accel.checkpoint.convert`."""

from dit_accel.checkpoint.convert import convert as convert
