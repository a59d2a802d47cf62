"""A bill of materials of this environment, and its known vulnerabilities: `python -m scripts.audit out=sbom.json`.

Ends with 1 only where a vulnerability is known: whatever the network keeps from being asked is said, and no failure.
"""

import argparse
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component
from cyclonedx.output.json import JsonV1Dot6
from packageurl import PackageURL

from rap_env.files import write_over
from scripts.options import parsed


def bill_of_materials() -> str:
    """All installed distributions in CycloneDX's JSON."""
    found = {each.metadata["Name"]: each.version for each in importlib.metadata.distributions()}
    urls = {name: PackageURL("pypi", name=name.lower().replace("_", "-"), version=found[name]) for name in found}
    components = [Component(name=name, version=found[name], purl=urls[name]) for name in sorted(found)]
    return JsonV1Dot6(Bom(components=components)).output_as_string(indent=2)


def known_vulnerabilities() -> tuple[int, list[str]]:
    """How many packages could be asked about, and what is known of them: `name version: identifier, mended in`."""
    command = [sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off"]
    said = subprocess.run(command, capture_output=True, text=True, timeout=600).stdout
    asked = [each for each in json.loads(said or '{"dependencies": []}')["dependencies"] if "vulns" in each]
    asked = [each for each in asked if "skip_reason" not in each]
    return len(asked), [
        f"{each['name']} {each['version']}: {found['id']}, mended in {', '.join(found['fix_versions']) or 'no version'}"
        for each in asked
        for found in each["vulns"]
    ]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.audit", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("outputs/sbom.json"), help="for the bill of materials")
    options = parsed(parser, arguments)
    bill = bill_of_materials()
    print(f"bill of materials: {write_over(options.out, bill)}, {len(json.loads(bill)['components'])} packages")
    n_asked, known = known_vulnerabilities()
    print("\n".join(known) or f"{n_asked} packages could be audited; no vulnerability of them is known")
    return min(1, len(known))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
