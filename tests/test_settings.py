"""Settings: addresses and secrets come from the environment, hyper-parameters never do."""

import os

import pytest
import torch
from pydantic import BaseModel

from coop_core.errors import ServiceError
from coop_core.methods import load_method, method_names
from coop_core.params import Params
from pipelines.settings import Settings, choose_device, load_settings

WITHOUT_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch, tmp_path):
    """No setting of whoever runs the tests, and no .env of theirs."""
    for name in os.environ:
        if name.upper().startswith("COOP_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def test_the_defaults_need_no_service():
    assert load_settings().tracking_uri == "sqlite:///mlflow.db"
    assert load_settings().s3_endpoint_url is None


@pytest.mark.parametrize("field", Settings.model_fields)
def test_every_field_has_its_variable(monkeypatch, field):
    value = {"device": "cpu", "prefect_port": "4321", "mlflow_port": "5432", "serve_port": "6543",
             "serve_token": "sixteen-or-more.", "project_name": "a-value",
             "serve_record_megabytes": "77", "serve_record_pictures": "True"}.get(field, "a-value")
    monkeypatch.setenv(f"COOP_{field.upper()}", value)

    found = getattr(load_settings(), field)

    assert (found.get_secret_value() if hasattr(found, "get_secret_value") else str(found)) == value


def test_a_projects_name_is_where_its_runs_are_kept_unless_another_is_set(monkeypatch):
    monkeypatch.setenv("COOP_PROJECT_NAME", "photos")
    assert load_settings().experiment == "photos"

    monkeypatch.setenv("COOP_EXPERIMENT", "own")
    assert load_settings().experiment == "own"


@pytest.mark.parametrize("name", ["", "Photos", "a/b", "-a", "a" * 41])
def test_a_projects_name_that_servers_may_refuse_is_refused(monkeypatch, name):
    monkeypatch.setenv("COOP_PROJECT_NAME", name)

    with pytest.raises(ServiceError, match="COOP_PROJECT_NAME is"):
        load_settings()


def test_an_env_file_in_the_working_folder_is_read(tmp_path):
    (tmp_path / ".env").write_text("COOP_TRACKING_URI=http://mlflow.example:5000\nOTHER=ignored\n")

    assert load_settings().tracking_uri == "http://mlflow.example:5000"


def test_a_variable_wins_over_the_env_file(monkeypatch, tmp_path):
    (tmp_path / ".env").write_text("COOP_EXPERIMENT=file\n")
    monkeypatch.setenv("COOP_EXPERIMENT", "variable")

    assert load_settings().experiment == "variable"


def test_an_env_file_that_is_no_text_is_a_sentence(tmp_path):
    (tmp_path / ".env").write_bytes(b"COOP_DEVICE=\xff\n")

    with pytest.raises(ServiceError, match=r"\.env"):
        load_settings()


def test_variables_without_the_prefix_change_nothing(monkeypatch):
    monkeypatch.setenv("DEVICE", "cuda")
    monkeypatch.setenv("TRACKING_URI", "http://elsewhere")

    assert load_settings() == Settings(_env_file=None)


@pytest.mark.parametrize("show", [repr, str, lambda settings: settings.model_dump_json()], ids=["repr", "str", "json"])
def test_secrets_do_not_show(monkeypatch, show):
    monkeypatch.setenv("COOP_S3_ACCESS_KEY_ID", "xyzzy-key")
    monkeypatch.setenv("COOP_S3_SECRET_ACCESS_KEY", "xyzzy-secret")

    assert "xyzzy" not in show(load_settings())


def test_settings_do_not_change_after_reading():
    with pytest.raises(ValueError, match="frozen"):
        load_settings().device = "cpu"


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "CPU", "cpu ", ""])
def test_an_unknown_device_is_refused_with_the_variable_and_its_value(monkeypatch, device):
    monkeypatch.setenv("COOP_DEVICE", device)

    with pytest.raises(ServiceError, match=f"^the environment or .env is not valid: COOP_DEVICE is '{device}': "):
        load_settings()


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:3"])
def test_a_known_device_is_taken(monkeypatch, device):
    monkeypatch.setenv("COOP_DEVICE", device)

    assert load_settings().device == device


@WITHOUT_CUDA
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_asking_for_cuda_without_one_is_a_sentence(device):
    with pytest.raises(ServiceError, match=f"^COOP_DEVICE is {device}, but torch sees no CUDA device: set it to auto"):
        choose_device(Settings(_env_file=None, device=device))


@WITHOUT_CUDA
@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_without_cuda_the_processor_is_chosen(device):
    assert choose_device(Settings(_env_file=None, device=device)) == "cpu"


def fields_below(model: type[BaseModel]) -> set[str]:
    """The names of all fields of a parameter tree, sections and what stands in them."""
    found = set(model.model_fields)
    for field in model.model_fields.values():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= fields_below(field.annotation)
    return found


def test_no_setting_is_a_hyper_parameter():
    methods = set().union(*(fields_below(load_method(name).Params) for name in method_names()))
    names = fields_below(Params) | methods

    assert {"seed", "learning_rate", "shots", "n_context"} <= names
    assert not names & set(Settings.model_fields)


def test_an_environment_variable_changes_no_hyper_parameter(monkeypatch):
    tree = {
        "seed": 1,
        "dataset": {"source": "images"},
        "split": {"shots": 2},
        "backbone": {"architecture": "mini"},
        "features": {},
        "method": {"name": "coop"},
        "train": {"epochs": 2, "learning_rate": 0.1},
        "baselines": {"ensemble_templates": ["a {}."]},
        "engine": {},
        "evaluate": {},
        "gate": {},
    }
    expected = Params.model_validate(tree)
    for name in ("SEED", "COOP_SEED", "COOP_TRAIN__LEARNING_RATE", "COOP_LEARNING_RATE"):
        monkeypatch.setenv(name, "7")

    assert Params.model_validate(tree) == expected


@pytest.mark.parametrize(
    ("address", "bare", "name", "password"),
    [("http://ann:xyzzy@h:5000/ml", "http://h:5000/ml", "ann", "xyzzy"),
     ("https://a%40b:xy%2Fzzy%3A@h", "https://h", "a@b", "xy/zzy:"),
     ("postgresql://:xyzzy@h/db", "postgresql://h/db", None, "xyzzy"),
     ("http://ann@h", "http://h", "ann", None),
     ("sqlite:////folder/me@work/mlflow.db", "sqlite:////folder/me@work/mlflow.db", None, None)],
)  # fmt: skip
def test_a_login_in_an_address_is_taken_out_of_it(monkeypatch, address, bare, name, password):
    monkeypatch.setenv("COOP_TRACKING_URI", address)
    found = load_settings()

    assert (found.tracking_uri, found.tracking_username) == (bare, name)
    assert (found.tracking_password and found.tracking_password.get_secret_value()) == password
    assert "xy" not in repr(found) + found.model_dump_json()


def test_logins_in_the_other_addresses_become_secrets_too(monkeypatch):
    monkeypatch.setenv("COOP_PREFECT_API_URL", "http://ann:xyzzy@h:4200/api")
    monkeypatch.setenv("COOP_S3_ENDPOINT_URL", "http://id:xyzzy@h")
    found = load_settings()

    assert (found.prefect_api_url, found.s3_endpoint_url) == ("http://h:4200/api", "http://h")
    assert found.prefect_api_auth.get_secret_value() == "ann:xyzzy"
    assert (found.s3_access_key_id.get_secret_value(), found.s3_secret_access_key.get_secret_value()) == ("id", "xyzzy")
    assert "xyzzy" not in repr(found) + found.model_dump_json()


def test_a_secret_of_its_own_wins_over_the_one_in_an_address(monkeypatch, tmp_path):
    (tmp_path / ".env").write_text("COOP_TRACKING_URI=http://ann:old@h\nCOOP_TRACKING_PASSWORD=new\n")

    assert load_settings().tracking_username == "ann"
    assert load_settings().tracking_password.get_secret_value() == "new"


@pytest.mark.parametrize(
    "address", ["http://ann:xyzzy/pass@h", "http://ann:9/xyzzy@h", "http://ann:xyzzy#1@h", "http://[x"]
)
def test_an_address_whose_login_cannot_be_told_is_refused_unseen(monkeypatch, address):
    monkeypatch.setenv("COOP_TRACKING_URI", address)

    with pytest.raises(ServiceError, match=r"^COOP_TRACKING_URI is no address: .*%40, %3A, %2F") as refused:
        load_settings()
    assert "xyzzy" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "nearest"), [("COOP_TRACKING_URL", "COOP_TRACKING_URI"), ("coop_devise", "COOP_DEVICE"),
                          ("COOP_SPLIT__SHOTS", "COOP_")],
)  # fmt: skip
@pytest.mark.parametrize("where", ["the environment", ".env"])
def test_an_unknown_name_is_refused_with_the_nearest_known_one(monkeypatch, tmp_path, name, nearest, where):
    if where == ".env":
        (tmp_path / ".env").write_text(f"# COOP_COMMENT=1\nexport {name}=1\nOTHER=1\n")
    else:
        monkeypatch.setenv(name, "1")

    with pytest.raises(
        ServiceError, match=rf"^{name} in {where} is no setting \(the nearest is {nearest}[A-Z0-9_]*\):"
    ):
        load_settings()


def test_all_unknown_names_are_named_and_no_value_is(monkeypatch, tmp_path):
    (tmp_path / ".env").write_text("COOP_S3_SECRET_KEY=xyzzy\n")
    monkeypatch.setenv("COOP_PORT", "xyzzy")

    with pytest.raises(ServiceError, match=r"^COOP_PORT in the environment .*; COOP_S3_SECRET_KEY in \.env") as refused:
        load_settings()
    assert "xyzzy" not in str(refused.value)


@pytest.mark.parametrize("name", ["COOP_SERVICE_OF", "COOP_PROJECT"])
def test_names_that_others_read_are_left_alone(monkeypatch, name):
    monkeypatch.setenv(name, "1")

    assert load_settings() == Settings(_env_file=None)
