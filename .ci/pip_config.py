"""Prints, as shell exports, what pip's configuration on this machine means to uv; what uv was told itself stays."""

import ast
import os
import shlex
import subprocess
import sys
from pathlib import Path


def pip_options(python: str) -> dict[str, str]:
    """pip's options by bare name; the environment's win over the files', and a later file's over an earlier one's."""
    listing = subprocess.run([python, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False)
    options: dict[str, str] = {}
    environment: dict[str, str] = {
        name.removeprefix("PIP_").lower().replace("_", "-"): value
        for name, value in os.environ.items()
        if name.startswith("PIP_")
    }
    for line in listing.stdout.splitlines():
        key, _, value = line.partition("=")
        section, _, name = key.rpartition(".")
        if section in ("global", "install"):
            options[name] = str(ast.literal_eval(value))
    return options | environment


def uv_variables(options: dict[str, str]) -> dict[str, str]:
    """The same in uv's variables."""
    variables = {}
    if "index-url" in options:
        variables["UV_DEFAULT_INDEX"] = options["index-url"]
    if "extra-index-url" in options:
        variables["UV_INDEX"] = " ".join(options["extra-index-url"].split())
        # pip looks at all indexes alike; uv would stop at the first. The locks' hashes make that harmless.
        variables["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    if links := [link for link in options.get("find-links", "").split() if "://" in link or Path(link).is_dir()]:
        variables["UV_FIND_LINKS"] = ",".join(links)
    if options.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        variables["UV_NO_INDEX"] = "true"
    if "cert" in options:
        variables["SSL_CERT_FILE"] = options["cert"]
    if "trusted-host" in options:
        variables["UV_INSECURE_HOST"] = " ".join(options["trusted-host"].split())
    if "proxy" in options:
        variables["ALL_PROXY"] = options["proxy"]
    if "timeout" in options or "default-timeout" in options:
        variables["UV_HTTP_TIMEOUT"] = options.get("timeout", options.get("default-timeout", ""))
    return variables


if __name__ == "__main__":
    for name, value in uv_variables(pip_options(sys.argv[1])).items():
        if name not in os.environ:
            print(f"export {name}={shlex.quote(value)}")
