# SPDX-License-Identifier: Apache-2.0
"""The embedded default of dpopt: a small language model trained on public text, and private records to tune it on.

Law: importing this package imports the standard library only; the model is loaded by transformers, from
`model_path()`, by whoever wants it.
"""

from pathlib import Path

from dpopt.embedded.records import Records, private_records

MODEL_PATH = Path(__file__).resolve().parent / "model"


def model_path() -> Path:
    """Return the folder of the shipped model and tokenizer, for `from_pretrained`."""
    if not (MODEL_PATH / "config.json").is_file():
        raise FileNotFoundError(
            f"the embedded model must be installed with dpopt; got no config.json in {MODEL_PATH.name}/; "
            "install dpopt from a complete checkout, or run python -m dpopt.embedded.pretrain"
        )
    return MODEL_PATH


__all__ = ["MODEL_PATH", "Records", "model_path", "private_records"]
