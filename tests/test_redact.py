"""Redaction: configurations become flat and lose their secrets."""

import dataclasses
import json
import string

import hypothesis.strategies as st
import jax.numpy as jnp
import pydantic
import pytest
from hypothesis import given
from onstep.redact import redacted, without_secrets

SECRET = "s3cr3t"
NAMES = [
    "token", "hf_token", "authToken", "TOKEN_PROD", "tokens", "password", "db.passwd", "PASSPHRASE", "pwd", "secret",
    "clientSecret", "api_key", "apiKey", "API-KEY", "aws_access_key_id", "private_key", "credentials", "Authorization",
    "cookie", "slack_webhook", "auth",
]  # fmt: skip
HARMLESS = [("tokenizer", "bpe"), ("max_tokens", 512), ("pad_token_id", 0), ("key", "image"), ("author", "me")]

text = st.text("aB1_-.:/@='\"é \n", max_size=8)
plain = st.none() | st.booleans() | st.integers() | st.floats() | text
words = text.filter(bool)
configs = st.dictionaries(
    words, st.recursive(plain, lambda inner: st.lists(inner) | st.dictionaries(words, inner), max_leaves=8), max_size=4
)
holders = [
    lambda name, value: {name: value},
    lambda name, value: {"a": {name: value, "b": 1}},
    lambda name, value: {"a": [{name: value}]},
    lambda name, value: {name: [value, value]},
    lambda name, value: {name: {"deep": [{"er": value}]}},
    lambda name, value: {"client": f"Client({name}='{value}', n=1)"},
    lambda name, value: {"url": f"https://host/?a=1&{name}={value}&b=2"},
    lambda name, value: {"headers": f"{name}: Bearer {value}"},
    lambda name, value: {"json": json.dumps({name: value})},
]


@pytest.mark.parametrize("holder", range(len(holders)))
@pytest.mark.parametrize("name", NAMES)
def test_value_under_a_secret_name_is_hidden_at_any_depth(name, holder):
    flat = redacted(holders[holder](name, SECRET))
    assert SECRET not in str(flat)
    assert "***" in str(flat)


@pytest.mark.parametrize(("name", "value"), HARMLESS, ids=[name for name, _ in HARMLESS])
def test_value_under_a_harmless_name_is_kept(name, value):
    assert redacted({name: value}) == {name: value}


@given(configs, st.sampled_from(NAMES), words)
def test_secret_is_hidden_in_any_configuration(config, name, key):
    secret = f"<{SECRET}>"
    config = {**config, key: {name: secret, "more": [config, {name: (secret,)}]}}
    assert SECRET not in str(redacted(config))


@given(
    st.sampled_from(["https", "postgresql+psycopg", "s3", "git+ssh"]),
    st.text(string.ascii_letters + string.digits + string.punctuation.replace(":", "").replace("@", ""), max_size=8),
    st.text(string.ascii_letters + string.digits + string.punctuation, max_size=8),
)
def test_user_and_any_password_in_a_url_are_hidden(scheme, user, password):
    text = without_secrets(f"see {scheme}://{user.replace('/', '')}:{password}{SECRET}@host/path now")
    assert SECRET not in text
    assert text.startswith("see ")
    assert text.endswith("host/path now")


def test_url_without_a_user_is_unchanged():
    for url in ("https://host/path", "https://host/@someone/story", "mail me@host", "git+https://host/repo@v1"):
        assert without_secrets(url) == url


def test_secret_url_is_hidden_in_lists_and_names():
    config = {"urls": ["https://u:p@h/x", "b"], "https://u:p@h": 1}
    assert redacted(config) == {"urls": "['https://***@h/x', 'b']", "https://***@h": 1}


def test_none_and_booleans_are_not_secret_but_numbers_are():
    config = {"password": None, "use_auth_token": True, "pwd": 1234}
    assert redacted(config) == {"password": None, "use_auth_token": True, "pwd": "***"}


@given(configs)
def test_every_value_is_plain_json(config):
    flat = redacted(config)
    assert all(value is None or isinstance(value, (bool, int, float, str)) for value in flat.values())
    json.dumps(flat)


def test_dicts_dataclasses_and_pydantic_models_become_flat():
    @dataclasses.dataclass
    class Optimizer:
        rate: float
        kind: object
        token: str

    class Model(pydantic.BaseModel):
        layers: tuple[int, ...]
        secret: pydantic.SecretStr
        rest: dict

    config = {
        "optimizer": Optimizer(0.1, jnp.float32, "x"),
        "model": Model(layers=(64, 32), secret=SECRET, rest={"empty": {}, "runs": [{"n": 1}, {"n": 2}]}),
    }
    assert redacted(config) == {
        "optimizer.rate": 0.1,
        "optimizer.kind": "float32",
        "optimizer.token": "***",
        "model.layers": "(64, 32)",
        "model.secret": "***",
        "model.rest.empty": "{}",
        "model.rest.runs.0.n": 1,
        "model.rest.runs.1.n": 2,
    }


def test_configuration_of_another_type_is_refused():
    with pytest.raises(TypeError, match="config needs a dict, a dataclass or a pydantic model, got list"):
        redacted([1])


def test_empty_configuration_is_an_empty_dict():
    assert redacted({}) == {}
