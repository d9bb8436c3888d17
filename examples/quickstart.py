"""From text to generated text with the public API.

    python examples/quickstart.py docs/

The argument is any corpus: text files, folders, ``.jsonl``, ``hf:org/name``, or ``stdlib:`` (the
Python standard library). The cache and the carry-on are written to the current folder.
"""

import sys

import embedcache as ec


def main(corpus: str) -> None:
    """Extract the corpus, train a carry-on, evaluate it, and generate with and without it."""
    ec.extract(corpus, base="builtin:smollm2-135m", out="cache")
    ec.train("cache", out="carryon", epochs=3)
    print(ec.evaluate("carryon", "cache"))

    model = ec.load("carryon")  # loads the base that the carry-on names, too
    print(ec.generate(model, "def main", max_new_tokens=40))
    print(ec.generate(model, "def main", max_new_tokens=40, alpha=0.0))  # the base alone


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python examples/quickstart.py CORPUS")
    main(sys.argv[1])
