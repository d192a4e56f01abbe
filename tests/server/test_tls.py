"""HTTPS with a certificate of one's own."""

from __future__ import annotations

import ssl

import httpx
import openai
import pytest
import trustme

from qvl.errors import ConfigError
from qvl.server.run_uvicorn import make_server
from tests.server.conftest import question, start
from tests.server.processes import CHAT


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def files(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Certificate and key of this machine, another key, a key with a password, and what is no PEM."""
    folder = tmp_path_factory.mktemp("tls")
    issued = authority.issue_cert("127.0.0.1", "localhost")
    (folder / "cert").write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(folder / "key")
    issued.private_key_and_cert_chain_pem.write_to_path(folder / "both")
    authority.issue_cert("127.0.0.1").private_key_pem.write_to_path(folder / "other")
    (folder / "prose").write_text("this is no key\n")
    (folder / "locked").write_bytes(locked(issued.private_key_pem.bytes()))
    return {name: str(folder / name) for name in ("cert", "key", "both", "other", "prose", "locked", "absent")}


def locked(pem: bytes) -> bytes:
    from cryptography.hazmat.primitives import serialization as form

    key = form.load_pem_private_key(pem, None)
    return key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.BestAvailableEncryption(b"sesame"))


def test_answers_come_over_https_to_those_who_trust_the_authority(authority: trustme.CA, files: dict[str, str]) -> None:
    running = start(tls=(files["cert"], files["key"]), wait=False)
    url = running.url.replace("http:", "https:")
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    try:
        with httpx.Client(base_url=url, verify=trusting, trust_env=False, timeout=30) as client:
            while client.get("/ready").status_code != 200:
                pass
            assert client.post(CHAT, json=question("hello")).json()["choices"][0]["message"]["content"] == "hello"
        with openai.OpenAI(
            base_url=f"{url}/v1", api_key="none", http_client=openai.DefaultHttpxClient(verify=trusting)
        ) as client:
            stream = client.chat.completions.create(model="echo-vl", messages=question("a b")["messages"], stream=True)
            assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == "a b"
        with httpx.Client(base_url=url, trust_env=False) as stranger, pytest.raises(httpx.ConnectError):
            stranger.get("/health")
        with httpx.Client(base_url=running.url, trust_env=False) as plain, pytest.raises(httpx.HTTPError):
            plain.get("/health")
    finally:
        running.stop()


@pytest.mark.parametrize(
    ("cert", "key", "said"),
    [
        ("cert", "other", "the key does not match the certificate"),
        ("cert", "absent", "absent cannot be read: no such file"),
        ("absent", "key", "absent cannot be read: no such file"),
        ("cert", "prose", "no PEM certificate or key"),
        ("prose", "key", "no PEM certificate or key"),
        ("cert", "locked", "the key has a password"),
        ("cert", None, "the key in it: no PEM certificate or key"),
        (None, "key", "TLS key given without a certificate"),
    ],
)
def test_files_that_cannot_work_are_one_line(
    files: dict[str, str], cert: str | None, key: str | None, said: str
) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        make_server(None, tls_cert=cert and files[cert], tls_key=key and files[key])  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert caught.value.hint


@pytest.mark.slow
def test_a_process_serves_https_and_refuses_a_wrong_key(run, endpoint, authority, files: dict[str, str]) -> None:
    from tests.server.processes import remote

    wrong = run(*remote(endpoint), "--tls-cert", files["cert"], "--tls-key", files["other"])
    assert wrong.ended(120) == 2
    assert [line for line in wrong.lines if line][-1].startswith("error: TLS cannot be set up")
    assert "Traceback" not in "\n".join(wrong.lines)
    process = run(*remote(endpoint), "--tls-cert", files["both"]).wait_ready()
    assert process.address.startswith("https://127.0.0.1:")
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    with httpx.Client(base_url=process.address, verify=trusting, trust_env=False, timeout=30) as client:
        assert client.post(CHAT, json=question("hello")).status_code == 200
