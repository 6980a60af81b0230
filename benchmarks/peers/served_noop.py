"""The same no-op behind other servers: `python served_noop.py fastapi|litserve|serve PORT`; prints `ready`."""

from __future__ import annotations

import sys
import threading
import time
import urllib.request
from typing import Any

BODY = b'{"inputs": [1.5]}'
# Of a deployment of Serve's: with its default of 5, the batcher waits for requests that cannot come.
MAX_ONGOING_REQUESTS = 100


def run_fastapi(port: int) -> None:
    import uvicorn
    from fastapi import FastAPI, Request

    app = FastAPI()

    async def predict(request: Request) -> dict[str, Any]:
        inputs = (await request.json())["inputs"]
        return {"predictions": [{"value": float(value)} for value in inputs]}

    predict.__annotations__["request"] = Request  # a name of this function, which FastAPI does not look into
    app.add_api_route("/v1/predict", predict, methods=["POST"])
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error")


def run_litserve(port: int) -> None:
    import litserve
    from litserve_noop import Noop

    server = litserve.LitServer(Noop(api_path="/v1/predict"), accelerator="cpu")
    server.run(host="127.0.0.1", port=port, num_api_servers=1, generate_client_file=False, log_level="error")


def run_serve(port: int) -> None:
    """Run what Ray Serve's documentation shows: an ingress in front of a batched deployment, Python proxy."""
    import ray
    from fastapi import FastAPI, Request
    from ray import serve

    app = FastAPI()

    @serve.deployment(ray_actor_options={"num_cpus": 0}, max_ongoing_requests=MAX_ONGOING_REQUESTS)
    class Model:
        @serve.batch(max_batch_size=64, batch_wait_timeout_s=0.005)
        async def predict(self, inputs: list[Any]) -> list[Any]:
            return [[{"value": float(value)} for value in each] for each in inputs]

        async def __call__(self, values: Any) -> Any:
            return await self.predict(values)

    class Ingress:
        def __init__(self, model: Any) -> None:
            self._model = model

        async def predict(self, request: Any) -> dict[str, Any]:
            return {"predictions": await self._model.remote((await request.json())["inputs"])}

    Ingress.predict.__annotations__["request"] = Request
    Ingress.predict = app.post("/v1/predict")(Ingress.predict)  # type: ignore[method-assign]
    options = {"ray_actor_options": {"num_cpus": 0}, "max_ongoing_requests": MAX_ONGOING_REQUESTS}
    ingress = serve.deployment(**options)(serve.ingress(app)(Ingress))
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(
        ingress.bind(Model.bind()), name="noop", route_prefix="/", logging_config={"enable_access_log": False}
    )
    threading.Event().wait()


def announce(port: int) -> None:
    """Say `ready` once a request is answered."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/predict", BODY, {"content-type": "application/json"}
    )
    while True:
        try:
            with urllib.request.urlopen(request, timeout=5) as response:
                if response.status == 200:
                    break
        except OSError:
            time.sleep(0.2)
    print("ready", flush=True)


def main() -> None:
    side, port = sys.argv[1], int(sys.argv[2])
    threading.Thread(target=announce, args=(port,), daemon=True).start()
    {"fastapi": run_fastapi, "litserve": run_litserve, "serve": run_serve}[side](port)


if __name__ == "__main__":
    main()
