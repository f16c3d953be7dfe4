"""Rights of Valkey's users, as they are rendered, in the real program: what they may do and what they may not."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import litellm
import pytest
import redis

from corral.render.secrets import initialise, read_env
from tests.needs import program
from tests.processes.fakes import LOOPBACK
from tests.processes.helpers import Process, free_port, wait_until
from tests.trees import plan_of

pytestmark = pytest.mark.needs("redis")

CASE, HOST = "heartcode", "prod"
PASSWORDS = {"litellm": "VALKEY_PASSWORD", "exporter": "VALKEY_EXPORTER_PASSWORD"}
REFUSED = (
    "CONFIG SET maxmemory 1", "CONFIG GET *", "FLUSHALL", "FLUSHDB", "SLAVEOF 192.0.2.1 1", "REPLICAOF NO ONE",
    "MODULE LIST", "DEBUG SLEEP 0", "SHUTDOWN NOSAVE", "SAVE", "KEYS *", "ACL LIST", "MONITOR", "CLIENT LIST",
    "CLIENT KILL ID 1", "FUNCTION LIST", "SCRIPT FLUSH", "MIGRATE 192.0.2.1 1 key 0 1", "SWAPDB 0 1",
)  # fmt: skip
Login = Callable[[str], redis.Redis]


@pytest.fixture
def login(tmp_path: Path) -> Iterator[Login]:
    """Valkey with the rendered users; a connection as one of them."""
    plan = plan_of(CASE)
    initialise({HOST: plan.secrets_of(HOST)}, tmp_path)
    secrets, port = read_env(tmp_path / HOST / ".env"), free_port()
    users = tmp_path / HOST / "secrets" / "VALKEY_USERS"
    command = [program("valkey-server", "redis-server"), "--port", port, "--aclfile", users, "--save", ""]

    def connect(user: str) -> redis.Redis:
        return redis.Redis(LOOPBACK, port, username=user, password=secrets[PASSWORDS[user]])

    with Process(list(map(str, command)), tmp_path / "log"):
        wait_until(lambda: _answers(connect("litellm")), 20, "Valkey answers")
        yield connect


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False


def test_the_gateways_user_does_not_rule_valkey(login: Login) -> None:
    with login("litellm") as own:
        for words in REFUSED:
            with pytest.raises(redis.ResponseError, match=r"no permissions|not allowed"):
                own.execute_command(*words.split())
        with pytest.raises(redis.ResponseError, match="can't run this command"):
            own.eval("return redis.call('FLUSHALL')", 0)


def test_the_gateways_user_may_all_that_litellm_does_in_its_scripts(login: Login) -> None:
    """By LiteLLM's own text, so that a new version that needs more is noticed."""
    texts = (path.read_text(errors="replace") for path in Path(litellm.__file__).parent.rglob("*.py"))
    used = {name.upper() for text in texts for name in re.findall(r"""redis\.call\(\s*['"](\w+)['"]""", text)}
    assert {"TIME", "INCRBYFLOAT", "ZADD", "EXPIRE"} <= used
    with login("litellm") as own:
        may = "return redis.acl_check_cmd(ARGV[1], 'key', '1', '2') and 1 or 0"
        assert [name for name in sorted(used) if not own.eval(may, 0, name)] == []
        assert own.eval(may, 0, "FLUSHALL") == 0
        assert len(own.eval("return redis.call('TIME')", 0)) == 2
        assert own.evalsha(own.script_load("return redis.call('INCR', KEYS[1])"), 1, "count") == 1
        assert own.info()["redis_version"]
        assert own.publish("channel", "message") == 0


def test_the_exporter_sees_figures_and_no_key(login: Login) -> None:
    with login("litellm") as gateway, login("exporter") as exporter:
        gateway.set("key", "value")
        assert exporter.info()["db0"]["keys"] == 1
        assert exporter.slowlog_len() == 0
        for words in ("GET key", "SCAN 0", "SET key other", "CONFIG GET *", "EVAL return(1) 0", "SUBSCRIBE channel"):
            with pytest.raises(redis.ResponseError, match="no permissions"):
                exporter.execute_command(*words.split())
