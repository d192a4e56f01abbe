"""The salt under which a backend may share what it computed."""

from __future__ import annotations

import time

from qvl.caches.policy import CachePolicy
from qvl.pipeline.job import Job, Stages
from qvl.types import ChatRequest, Message, TextPart


def salt(namespace: str, own: str = "") -> str:
    request = ChatRequest((Message("user", (TextPart("x"),)),), cache_salt=own)
    return Job(request, CachePolicy(), {}, None, time.perf_counter(), Stages(), namespace=namespace).salt


def test_a_salt_of_the_clients_own_stays_within_its_namespace() -> None:
    assert salt("a", "ours") == salt("a", "ours")
    assert len({salt("a", "ours"), salt("b", "ours"), salt("a", "other"), salt("a"), salt("b"), ""}) == 6


def test_no_salt_can_be_chosen_that_is_another_namespaces() -> None:
    assert salt("b", salt("a")) != salt("a")
    assert salt("a", '"]') != salt('a", ""]')


def test_without_a_namespace_the_salt_is_the_clients_own() -> None:
    assert (salt("", "ours"), salt("")) == ("ours", "")
