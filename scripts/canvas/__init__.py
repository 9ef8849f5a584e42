"""How the embedded world's checkpoint and judges are made and measured; not installed."""
