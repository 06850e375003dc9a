"""Records in, and what people look at out: logs, pictures, tables, a progress bar.

Everything here turns plain records (dicts, as found in `metrics.jsonl`) into files or text
and knows nothing of models, options or devices.
"""
