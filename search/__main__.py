"""Codes for your own images: from a folder to an index, to a page that finds.

python -m search fit PHOTOS --notes mine
python -m search index PHOTOS --model checkpoints/mine -o mine.index
python -m search query mine.index IMAGE
python -m search serve mine.index

fit         train on a folder of images, no labels needed
index       encode a folder, or a list of files, into an index
query       find the images most like some others
duplicates  list pairs of images that are nearly the same
serve       a page, and JSON, that search the index
export      the index and the model for ONNX, faiss and Parquet

`python -m search VERB --help` says more.
"""

import argparse
import sys

from utils import InputError, Parser, load_object, run_script

VERBS = {
    "fit": "search.fit:main",
    "index": "search.indexing:main",
    "query": "search.query:main",
    "duplicates": "search.duplicates:main",
    "serve": "search.serve:main",
    "export": "search.export:main",
}


def main(argv: list[str] | None = None) -> None:
    """Hand the arguments behind the verb to its module."""
    parser = Parser(prog="python -m search", description=__doc__, add_help=False, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    argv = sys.argv[1:] if argv is None else argv
    verb, *rest = argv or ["--help"]
    if verb in ("-h", "--help"):
        parser.print_help()
    elif verb in VERBS:
        load_object(VERBS[verb])(rest)
    else:
        raise InputError(f"{verb}: is no verb of python -m search; there are {', '.join(VERBS)}")


if __name__ == "__main__":
    sys.exit(run_script(main))
