"""``python -m lloco_engine`` is the command ``lloco``."""

from lloco_engine.cli import main

if __name__ == "__main__":
    main()
