"""What a machine of the pool is made for: everything of a pod, and of who asks for it, that it has to fit.

Plain values, since casemated hands them on without knowing what they mean. A `start` whose order has the same
digest may be given the machine. It must not know how one is made.
"""

import json
from dataclasses import dataclass
from typing import Any

from config.settings import Profile, Settings, from_mapping, to_mapping
from node.likeness import Nature
from shim.paths import sha256_hex
from shim.wants import Wants

DIGITS = 8


@dataclass(frozen=True, slots=True)
class Order:
    """wants: its host name does not count. nature: of the `start` that it has to be like."""

    settings: Settings
    wants: Wants
    nature: Nature

    def words(self) -> dict[str, Any]:
        return {
            "settings": to_mapping(self.settings),
            "profile": vars(self.wants.profile),
            "tenant": self.wants.tenant,
            "own_files": self.wants.own_files,
            "shares_directories": self.wants.shares_directories,
            "nature": self.nature,
        }

    @property
    def digest(self) -> str:
        """DIGITS hexadecimal digits: with which the name of such a machine's directory begins."""
        return sha256_hex(json.dumps(self.words(), sort_keys=True))[:DIGITS]

    @property
    def is_pooled(self) -> bool:
        """Whether the operator wants any. Pods that annotations make unlike their profile have none, nor have
        pods with devices."""
        profile = self.wants.profile
        wanted = self.settings.node.pool.get(profile.name, 0)
        usual = profile.template != "off" and self.settings.profiles[profile.name] == profile
        return wanted > 0 and usual and not self.wants.devices


def from_words(words: dict[str, Any], own: Nature) -> Order:
    """own: the nature where the words name none, as nobody has asked yet. Raises KeyError, TypeError or
    ValueError."""
    wants = Wants(
        profile=Profile(**words["profile"]),
        tenant=words["tenant"],
        own_files=words["own_files"],
        shares_directories=words["shares_directories"],
        hostname="",
    )
    return Order(from_mapping(words["settings"]), wants, words["nature"] or own)
