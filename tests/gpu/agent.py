"""A running nvshare-agent and its operator's tool, for what runs on a real GPU."""

import json
import re
import subprocess
import time
import urllib.request
from pathlib import Path

METRICS = "127.0.0.1:19464"


class Agent:
    """Serves `run_dir`; its log is there too. `config` is the text of a configuration file."""

    def __init__(self, binaries, run_dir, config=None, metrics=METRICS, record=None):
        self.binaries, self.run_dir = binaries, run_dir
        self.log = open(run_dir / "agent.log", "a")
        command = [str(binaries / "nvshare-agent"), "run", "--run-dir", str(run_dir), "--metrics-listen", metrics]
        if config is not None:
            path = run_dir / "agent.toml"
            path.write_text(config)
            command += ["--config", str(path)]
        if record is not None:
            command += ["--record", str(record)]
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log)
        deadline = time.monotonic() + 20
        while self.ctl("status", "--json", check=False) is None:
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the agent does not answer:\n" + Path(self.log.name).read_text()[-4000:])
            time.sleep(0.05)

    def ctl(self, *args, check=True):
        done = subprocess.run(
            [str(self.binaries / "nvsharectl"), "--run-dir", str(self.run_dir), *args],
            capture_output=True, text=True, timeout=30,
        )
        if done.returncode != 0:
            if check:
                raise RuntimeError(f"nvsharectl {args}: {done.stderr}")
            return None
        try:
            return json.loads(done.stdout.strip().splitlines()[-1])
        except (ValueError, IndexError):
            return done.stdout

    def client(self, worker):
        for client in self.ctl("clients", "--json")["clients"]:
            if client["pid"] == worker.process.pid:
                return client
        raise RuntimeError(f"{worker.name} is not among the agent's clients")

    def settled(self, worker):
        """The client's figures once the agent has sampled everything that happened before."""
        time.sleep(0.5)
        return self.client(worker)

    def metric(self, name):
        """Sum of a metric over its labels."""
        text = urllib.request.urlopen(f"http://{METRICS}/metrics", timeout=5).read().decode()
        values = re.findall(rf"^{name}(?:{{[^}}]*}})? ([0-9.e+-]+)$", text, re.M)
        if not values:
            raise RuntimeError(f"no metric {name}")
        return sum(float(v) for v in values)

    def joined(self):
        """Process ids of all clients there have been, from the agent's log."""
        log = Path(self.log.name).read_text(errors="replace")
        return {int(pid) for pid in re.findall(r"client joined .*?\bpid=(\d+)", log)}

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def mode(self):
        return self.ctl("status", "--json")["gpus"][0]["mode"]
