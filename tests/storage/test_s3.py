"""Checkpoints in a bucket of a real S3 server, in every format, for everything that takes a path."""

from __future__ import annotations

import datetime
import socket
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_memload import (
    MemoryEfficientRestore,
    StreamingCheckpointIO,
    WeightsSource,
    load_from_checkpoint,
    load_weights,
    meta_init,
    open_checkpoint,
    verify_checkpoint,
)
from lightning_memload.cli import main
from lightning_memload.storage import places
from lightning_memload.storage.object_store import ObjectStore
from tests.plugins.harness import FEATURES, TRUSTED, Case, TinyModule, adamw, make_trainer, write_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")

pytest.importorskip("obstore")
moto_server = pytest.importorskip("moto.server")
boto3 = pytest.importorskip("boto3")


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    yield f"http://127.0.0.1:{port}"
    server.stop()


@pytest.fixture
def client(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Credentials and endpoint are found in the environment, as the documentation of obstore says."""
    monkeypatch.setitem(places.PLACES, "s3", ObjectStore())  # It remembers nothing of other tests.
    for name, value in {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "not-to-be-shown",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ALLOW_HTTP": "true",
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
    client.create_bucket(Bucket="bucket")
    yield client
    for found in client.list_objects_v2(Bucket="bucket").get("Contents", ()):
        client.delete_object(Bucket="bucket", Key=found["Key"])


SOON = datetime.timedelta(seconds=0.01)
RETRY_ONCE = {
    "max_retries": 1,
    "retry_timeout": datetime.timedelta(seconds=1),
    "backoff": {"init_backoff": SOON, "max_backoff": SOON, "base": 2},
}


class Validated(TinyModule):
    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        assert self.first(batch).isfinite().all()


def upload(client: Any, folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            client.upload_file(str(file), "bucket", str(file.relative_to(folder.parent)))


@pytest.fixture(params=["torch", "directory", "safetensors+state"])
def checkpoint(request: pytest.FixtureRequest, client: Any, tmp_path: Path) -> tuple[Path, str]:
    """A checkpoint on the disk, and the same in the bucket."""
    folder = tmp_path / "run"
    folder.mkdir()
    case = Case(lambda: TinyModule(adamw), plugins=lambda: [StreamingCheckpointIO(format=request.param)])
    path = write_checkpoint(case, folder)
    upload(client, folder)
    return path, f"s3://bucket/run/{path.name}"


def losses(trainer_folder: Path, path: object, **kwargs: Any) -> tuple[list[str], MemoryEfficientRestore]:
    torch.manual_seed(0)
    module, restore = TinyModule(adamw), MemoryEfficientRestore(**kwargs)
    make_trainer(trainer_folder, [restore], max_epochs=1).fit(module, ckpt_path=path, **TRUSTED)
    return [loss.item().hex() for loss in module.losses], restore


def test_a_resume_is_that_of_the_file(checkpoint: tuple[Path, str], tmp_path: Path) -> None:
    path, url = checkpoint
    expected, _ = losses(tmp_path, path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        actual, restore = losses(tmp_path, url)
    assert not [str(item.message) for item in caught if "ordinary way" in str(item.message)]
    assert actual == expected
    assert restore.report is not None
    assert restore.report.bytes_verified > 0
    assert restore.report.path == url


def test_all_that_takes_a_path(checkpoint: tuple[Path, str], tmp_path: Path, capsys: Any) -> None:
    path, url = checkpoint
    assert len(open_checkpoint(url)) == len(open_checkpoint(path))
    report = verify_checkpoint(url)
    assert report.is_verified
    assert report.bytes_verified == verify_checkpoint(path).bytes_verified
    assert main(["verify", url]) == 0
    assert main(["inspect", url]) == 0
    assert url in capsys.readouterr().out
    with meta_init():
        module = TinyModule(adamw)
    expected = TinyModule(adamw)
    load_weights(module, url, weights_only=False)
    load_weights(expected, path, weights_only=False)
    for name, value in expected.state_dict().items():
        assert torch.equal(module.state_dict()[name], value)
    restore = MemoryEfficientRestore(weights_from=WeightsSource(url, weights_only=False))
    torch.manual_seed(0)
    make_trainer(tmp_path, [restore], max_epochs=1).fit(TinyModule(adamw))
    assert restore.report is not None
    assert restore.report.path == url
    data: Any = torch.utils.data.DataLoader(torch.randn(2, FEATURES))  # type: ignore[arg-type]
    for options in ({"callbacks": [MemoryEfficientRestore()]}, {"callbacks": [], "plugins": [StreamingCheckpointIO()]}):
        make_trainer(tmp_path, **options).validate(Validated(), data, ckpt_path=url, verbose=False, **TRUSTED)
    if path.is_file():
        load_from_checkpoint(TinyModule, url, weights_only=False)


def test_no_such_object(client: Any) -> None:
    with pytest.raises(FileNotFoundError):
        open_checkpoint("s3://bucket/run/nothing.ckpt")


def test_no_such_bucket(client: Any) -> None:
    with pytest.raises(FileNotFoundError):
        open_checkpoint("s3://no-such-bucket/run/nothing.ckpt")


def test_an_object_that_was_replaced(client: Any, tmp_path: Path) -> None:
    """The server compares the tag of every request."""
    values = {f"{number}": torch.randn(1000, 1000) for number in range(4)}
    torch.save(values, tmp_path / "a.pt")
    client.upload_file(str(tmp_path / "a.pt"), "bucket", "a.pt")
    module = torch.nn.ParameterDict({name: torch.nn.Parameter(torch.zeros(1000, 1000)) for name in values})
    store = places.PLACES["s3"]
    opened = store.open("s3://bucket/a.pt")
    torch.save({name: value + 1 for name, value in values.items()}, tmp_path / "a.pt")
    client.upload_file(str(tmp_path / "a.pt"), "bucket", "a.pt")
    with pytest.raises(OSError, match="was replaced since it was opened"):
        opened.pread(2 << 20, 1 << 20)
    with pytest.raises(OSError, match="was replaced since it was opened"):
        load_weights(module, "s3://bucket/a.pt")


def test_secrets_are_not_in_errors(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(OSError, match="HEAD failed") as raised:
        open_checkpoint("s3://elsewhere/run/last.ckpt")
    assert "not-to-be-shown" not in str(raised.value)


def test_options_for_one_load(endpoint: str, client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the environment: all is passed."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION", "AWS_ENDPOINT_URL", "AWS_ALLOW_HTTP"):
        monkeypatch.delenv(name)
    path = write_checkpoint(Case(lambda: TinyModule(adamw)), tmp_path)
    client.upload_file(str(path), "bucket", "a b/last%20.ckpt")
    url = "s3://bucket/a b/last%20.ckpt"
    options = {
        "access_key_id": "key",
        "secret_access_key": "not-to-be-shown",
        "region": "us-east-1",
        "endpoint": endpoint,
        "client_options": {"allow_http": True},
    }
    with pytest.raises(OSError, match=r"failed|credentials|No such"):
        open_checkpoint(url, storage_options={**options, "endpoint": "http://127.0.0.1:9", "retry_config": RETRY_ONCE})
    assert len(open_checkpoint(url, storage_options=options)) == len(open_checkpoint(path))
    assert verify_checkpoint(url, storage_options=options).is_verified
    load_weights(TinyModule(adamw), url, weights_only=False, storage_options=options)
    expected, _ = losses(tmp_path, path)
    assert losses(tmp_path, url, storage_options=options)[0] == expected
    torch.manual_seed(0)
    restore = MemoryEfficientRestore(weights_from=url, storage_options=options)
    make_trainer(tmp_path, [restore], max_epochs=1).fit(TinyModule(adamw))
    assert restore.report is not None


def test_a_profile(client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """obstore itself looks for no profiles, and boto3, which stock Lightning's loader uses, does."""
    path = write_checkpoint(Case(lambda: TinyModule(adamw)), tmp_path)
    client.upload_file(str(path), "bucket", "last.ckpt")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    (tmp_path / "credentials").write_text("[mine]\naws_access_key_id = a\naws_secret_access_key = b\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "mine")
    monkeypatch.setattr("lightning_memload.storage.object_store._STORES", {})
    assert len(open_checkpoint("s3://bucket/last.ckpt")) == len(open_checkpoint(path))
