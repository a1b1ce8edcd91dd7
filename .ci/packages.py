#!/usr/bin/env python3
"""Checks the archives that `cargo package` made of this workspace: what crates.io would get.

Each archive has a README, both licences, keywords, categories and settings for docs.rs, no test data, and is smaller than
what crates.io takes. Its library and programs include only files that are in the archive. Unit tests may include test data,
which the archive lacks, but no file of another package.

    .ci/packages.py FOLDER      exit status 1 and one line for each problem
    .ci/packages.py --self-test
"""

import json
import pathlib
import posixpath
import re
import subprocess
import sys
import tarfile
import tomllib

ROOT = pathlib.Path(__file__).resolve().parent.parent
LARGEST = 10 * 1024 * 1024  # of crates.io
LICENCES = ("LICENSE-MIT", "LICENSE-APACHE")
UNIT_TESTS = re.compile(r"^#\[cfg\((?:all\()?test\b.*\]\n(?:pub\(crate\) )?mod \w+ \{", re.M)
# Not those in a message, whose quotation marks are escaped.
INCLUDE = re.compile(r"\binclude(?:_bytes|_str)?!\s*\(\s*([^\\;][^;]*?)\)|#\[path\s*=\s*(\"[^\"]*\")\]")


def includes(text):
    """The macros' arguments, each a path as a Rust literal or an expression."""
    return [(found[1] or found[2]).strip() for found in INCLUDE.finditer(text)]


def sources(files):
    """What is wrong with the includes of {path: content}."""
    for path, content in files.items():
        if not path.endswith(".rs"):
            continue
        text = re.sub(r"^\s*//.*$", "", content.decode(), flags=re.M)
        # Unit tests end a file, or have one of their own.
        shipped, *tests = UNIT_TESTS.split(text, maxsplit=1)
        if path.endswith("/tests.rs"):
            shipped, tests = "", [text]
        for part, tested in ((shipped, False), ("".join(tests), True)):
            for argument in includes(part):
                literals = re.findall(r'"([^"]*)"', argument)
                target = posixpath.normpath(posixpath.join(posixpath.dirname(path), literals[0] if literals else ""))
                if target.startswith("..") or not literals:
                    yield f"{path} includes what is outside of the package: {argument}"
                elif not tested and (len(literals) != 1 or target not in files):
                    yield f"{path} includes a file that is not in the package: {argument}"


def check(manifest, files, size):
    """What is wrong with a package: its normalised manifest, {path: content}, and the size of its archive."""
    package = manifest["package"]
    for key in ("description", "license", "readme", "keywords", "categories", "rust-version"):
        if not package.get(key):
            yield f"the manifest has no `{key}`"
    if not package.get("metadata", {}).get("docs", {}).get("rs"):
        yield "the manifest has no [package.metadata.docs.rs]"
    if not files.get("README.md", b"").startswith(f"# {package['name']}\n".encode()):
        yield "README.md is missing, or its title is another name"
    for name in LICENCES:
        if files.get(name) != (ROOT / name).read_bytes():
            yield f"{name} is missing, or is not the one at the root"
    for path in files:
        if "testdata" in path.split("/"):
            yield f"{path} is test data"
    if size > LARGEST:
        yield f"the archive has {size} bytes, and crates.io takes {LARGEST}"
    yield from sources(files)


def read(path):
    """{path in the package: content} of an archive."""
    with tarfile.open(path) as archive:
        files = [member for member in archive if member.isfile()]
        return {member.name.split("/", 1)[1]: archive.extractfile(member).read() for member in files}


def main(arguments):
    if arguments == ["--self-test"]:
        return self_test()
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    metadata = subprocess.run(
        ["cargo", "metadata", "--no-deps", "--locked", "--offline", "--format-version", "1"],
        check=True, capture_output=True, cwd=ROOT,
    )
    published = [package for package in json.loads(metadata.stdout)["packages"] if package["publish"] is None]
    problems = 0
    for package in published:
        path = pathlib.Path(arguments[0], f"{package['name']}-{package['version']}.crate")
        files = read(path)
        manifest = tomllib.loads(files["Cargo.toml"].decode())
        for problem in check(manifest, files, path.stat().st_size):
            problems += 1
            print(f"{package['name']}: {problem}", file=sys.stderr)
    print(f"{len(published)} packages, {problems} problems")
    return 1 if problems or not published else 0


def self_test():
    manifest = {
        "package": {
            "name": "a", "description": "a", "license": "a", "readme": "README.md", "keywords": ["a"],
            "categories": ["a"], "rust-version": "1", "metadata": {"docs": {"rs": {"targets": ["a"]}}},
        }
    }
    files = {name: (ROOT / name).read_bytes() for name in LICENCES}
    files |= {"README.md": b"# a\n", "assets/model": b"", "src/lib.rs": b""}
    unit = b"#[cfg(test)]\nmod tests {\n    #[test]\n"
    good = {
        "an asset": {"src/lib.rs": b'include_bytes!("../assets/model")'},
        "test data of a unit test": {"src/lib.rs": unit + b'include_bytes!("../testdata/a")\n}'},
        "a comment": {"src/lib.rs": b'// include_bytes!("../../a")'},
    }
    bad = {
        "test data": {"testdata/a": b""},
        "no README": {"README.md": b""},
        "another licence": {"LICENSE-MIT": b""},
        "test data in the library": {"src/lib.rs": b'include_bytes!("../testdata/a")'},
        "a file of another package": {"src/lib.rs": b'include_str!(\n    "../../a/b"\n)'},
        "the same in a test": {"tests/a.rs": b'include_str!("../../../README.md")'},
        "the same in a unit test": {"src/lib.rs": unit + b'include_str!("../../a")\n}'},
        "a path that is computed": {"src/lib.rs": b'include_str!(concat!("../assets/", "model"))'},
        "a module elsewhere": {"src/lib.rs": b'#[path = "../../a.rs"]\nmod a;'},
    }
    problems = lambda change: list(check(manifest, files | change, 1))
    wrong = [name for name, change in good.items() if problems(change)]
    wrong += [name for name, change in bad.items() if not problems(change)]
    bare = {"package": {"name": "a"}}
    wrong += ["no keywords"] if len(list(check(bare, files, 1))) < 7 else []
    wrong += ["a large one"] if not list(check(manifest, files, LARGEST + 1)) else []
    for name in wrong:
        print(f"wrong verdict: {name}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
