"""How far models with quantized caches are from the float one: on text, in recall, in what they write, and how fast."""
