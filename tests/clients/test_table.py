"""README tells of the clients that the tests ask, in the versions that they install: without asking them."""

from __future__ import annotations

import json
import re

from tests.clients.environments import CLIENTS, ENVIRONMENTS, FEATURES, PROGRAMS, ROOT, Client

TABLE = (ROOT / "README.md").read_text(encoding="utf-8").partition("\n| client |")[2].partition("\n\n")[0]
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in TABLE.splitlines()]


def pinned(client: Client) -> str:
    """The version that a client's environment has."""
    if client.environment == "node":
        packages = json.loads((PROGRAMS / "node" / "package.json").read_text(encoding="utf-8"))["dependencies"]
        return str(packages[client.name.partition(" ")[0]])
    for package in ENVIRONMENTS[client.environment].packages:
        name, version = package.split("==")
        if re.sub(r"\[.*|-slim.*", "", name) == client.name:
            return version
    raise AssertionError(f"nothing installs {client.name}")


def test_the_readme_has_the_clients_of_the_tests_with_their_versions_and_features() -> None:
    wanted = [
        [client.name, pinned(client), client.api, *("yes" if one in client.features else "-" for one in FEATURES)]
        for client in CLIENTS
    ]
    head, _, *found = ROWS
    assert head == ["version", "over", *FEATURES]
    assert found == wanted
