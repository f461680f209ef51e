"""Speed of models that come with code of their own: measured where that code is trusted."""

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from laco_train.study.speed import Speed, measure_speeds
from tests.collapse.tiny import tiny

pytestmark = pytest.mark.usefixtures("modules_folder")


def test_code_of_a_model_runs_where_it_is_trusted(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    tiny("internlm2").save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    assert "model.trust_remote_code" in str(measure_speeds([tmp_path]).models[tmp_path])
    assert isinstance(measure_speeds([tmp_path], trust_remote_code=True).models[tmp_path], Speed)
