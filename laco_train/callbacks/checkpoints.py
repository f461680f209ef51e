"""Which checkpoint a run that stops early leaves behind."""

from pathlib import Path

from lightning.pytorch import Trainer


def last_checkpoint(trainer: Trainer) -> Path | str:
    """The last checkpoint that was written whole, or words that say that there is none."""
    named = Path(getattr(trainer.checkpoint_callback, "best_model_path", ""))
    # the one being saved when the run broke is named already, but never written
    written = [named] if named.is_file() else sorted(named.parent.glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    return written[-1] if named.name and written else "none was saved yet"
