"""Puts the embedded model into the cache folder, if it is not there yet: `python -m scripts.fetch_model`."""

import sys

from rap_env.errors import RapError
from rap_env.llm.embedded import embedded_folder

if __name__ == "__main__":
    try:
        print("model: SmolLM2-135M-Instruct; fetched and converted on first use, under a minute")
        print(f"model: {embedded_folder()}")
    except RapError as error:
        sys.exit(f"error: {error}")
