"""Former module of `convert`, which is now `dit_accel.checkpoint.convert`; programs that import it from here still work."""

from dit_accel.checkpoint.convert import convert as convert
