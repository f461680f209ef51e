"""The bar of a run: batches of the whole run, and the time left."""

from lightning.pytorch.callbacks import RichProgressBar


class RunProgressBar(RichProgressBar):
    """Lightning's rich bar; a run is counted in steps, so that the epoch it may never end is left out."""

    def _get_train_description(self, current_epoch: int) -> str:
        return "Training"
