"""Flower's older interface: a client_fn with a NumPyClient, and a server_fn with a strategy."""

import json
from pathlib import Path

import numpy as np
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from flwr.common import ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server import ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.serverapp import ServerApp


class Client(NumPyClient):
    def __init__(self, row):
        self.row = row

    def fit(self, parameters, config):
        rng = np.random.default_rng(self.row)
        return [parameters[0] + rng.normal(size=3) + self.row], 10 * (self.row + 1), {}

    def evaluate(self, parameters, config):
        return float(np.square(parameters[0] - self.row).sum()), 10, {}


class Saving(FedAvg):
    def __init__(self, out):
        super().__init__(initial_parameters=ndarrays_to_parameters([np.zeros(3)]))
        self.out, self.found = out, []

    def aggregate_fit(self, server_round, results, failures):
        parameters, metrics = super().aggregate_fit(server_round, results, failures)
        self.found.append(parameters_to_ndarrays(parameters)[0].round(9).tolist())
        return parameters, metrics

    def aggregate_evaluate(self, server_round, results, failures):
        loss, metrics = super().aggregate_evaluate(server_round, results, failures)
        self.found.append(round(loss, 9))  # sums depend on the order of arrival
        Path(self.out).write_text(json.dumps(self.found))
        return loss, metrics


def client_fn(context):
    return Client(int(context.node_config["partition-id"])).to_client()


def server_fn(context):
    return ServerAppComponents(strategy=Saving(str(context.run_config["out"])), config=ServerConfig(num_rounds=2))


client = ClientApp(client_fn=client_fn)
server = ServerApp(server_fn=server_fn)
