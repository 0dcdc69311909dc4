"""Where casemate's settings are read from and what is known about them is cached.

Spells three directories and the environment variables that replace them; reads nothing.
"""

import os

RUN_DIR_VARIABLE = "CASEMATE_RUN_DIR"
CONFIG_DIR_VARIABLE = "CASEMATE_CONFIG_DIR"
IMAGE_DIR_VARIABLE = "CASEMATE_IMAGE_DIR"
TEMPLATE_DIR_VARIABLE = "CASEMATE_TEMPLATE_DIR"
LEDGER_DIR_VARIABLE = "CASEMATE_LEDGER_DIR"

LEDGER_FILE = "ledger.sqlite"  # in settings.ledger_dir

PACKAGE_DIR = os.path.dirname(os.path.abspath(__file__))
DEFAULT_FILE = os.path.join(PACKAGE_DIR, "default.toml")


def run_dir() -> str:
    return os.environ.get(RUN_DIR_VARIABLE) or "/run/casemate"


def cache_dir() -> str:
    return os.path.join(run_dir(), "cache")


def config_dir() -> str:
    return os.environ.get(CONFIG_DIR_VARIABLE) or "/etc/casemate"


def config_files() -> list[str]:
    """Every file that may set an option, in the order in which they are merged.

    config.toml is named whether it exists or not. Raises OSError if config.d cannot be listed.
    """
    directory = config_dir()
    drop_ins = os.path.join(directory, "config.d")
    try:
        names = sorted(name for name in os.listdir(drop_ins) if name.endswith(".toml"))
    except (FileNotFoundError, NotADirectoryError):
        names = []
    return [
        DEFAULT_FILE,
        os.path.join(directory, "config.toml"),
        *(os.path.join(drop_ins, name) for name in names),
    ]
