"""A user's own task that writes down which thousands it began to answer; the first one takes long."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from echo_task import EchoTask

from eagleray.tasks import Answer, Batch, Processor

THOUSAND = 1000


class NotingTask(EchoTask):
    def predict(self, model: Any, batch: Batch, processor: Processor, options: Mapping[str, Any]) -> list[Answer]:
        values = batch["value"].tolist()
        config = self.config.model.config
        for value in values:
            if value % THOUSAND == 0:
                with Path(config["notes"]).open("a") as notes:
                    notes.write(f"{int(value // THOUSAND)}\n")
        if 0 in values:
            time.sleep(config["first_s"])
        time.sleep(0.02)
        return [{"value": 2 * value} for value in values]
