"""Loggers that would stop the first training are refused by the plan, which asks nothing over the network."""

from pathlib import Path

import pytest

from saeflow.config import ConfigError
from saeflow.training import loggers
from saeflow.training.loggers import check_loggers

NOBODY = r"nobody is logged in to wandb here: run `wandb login` once or set WANDB_API_KEY, or set WANDB_MODE=offline"


@pytest.fixture
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder in which nobody is logged in."""
    for name in ("API_KEY", "MODE", "BASE_URL", "CONFIG_DIR", "IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loggers, "find_spec", lambda name: object())
    return tmp_path


def test_wandb_without_a_login_is_refused(nobody: Path) -> None:
    check_loggers([])
    check_loggers(["tensorboard"])
    with pytest.raises(ConfigError, match=NOBODY):
        check_loggers(["tensorboard", "wandb"])


@pytest.mark.parametrize(
    ("name", "value"),
    [("WANDB_API_KEY", "0" * 40), ("WANDB_MODE", "offline"), ("WANDB_MODE", "disabled")],
)
def test_an_environment_with_a_key_or_without_uploads_will_do(
    nobody: Path, name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    check_loggers(["wandb"])


def test_a_login_of_this_server_will_do(nobody: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (nobody / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    (nobody / ".netrc").chmod(0o600)
    check_loggers(["wandb"])
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    with pytest.raises(ConfigError, match=NOBODY):
        check_loggers(["wandb"])


@pytest.mark.parametrize(("mode", "refused"), [("offline", False), ("online", True)])
def test_settings_of_wandb_count(nobody: Path, mode: str, refused: bool) -> None:
    (nobody / ".config/wandb").mkdir(parents=True)
    (nobody / ".config/wandb/settings").write_text(f"[default]\nmode = {mode}\n")
    if refused:
        with pytest.raises(ConfigError, match=NOBODY):
            check_loggers(["wandb"])
    else:
        check_loggers(["wandb"])


def test_a_package_that_is_not_there_is_refused(nobody: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"training.loggers=tensorboard needs the package tensorboard: pip install"):
        check_loggers(["tensorboard"])
