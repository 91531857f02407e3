# For a new user: `make demo` and `make test`. Each makes its own environment; PYTHON=python3.12 chooses one.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && { echo $$p; break; }; done)

# Two workers: one for what starts processes, one for what computes (tests/conftest.py).
TWO = -n 2 --dist loadgroup

.PHONY: demo test test-oldest test-exo test-agents agents browser coverage lint types docs reference wheel-check clean

demo: .venv/done
	.venv/bin/exo-kimi demo

test: .venv-test/done
	.venv-test/bin/python -m pytest $(TWO)

# The oldest mlx and mlx-lm that must work (exo's), over everything that touches them.
test-oldest: .venv-oldest/done
	.venv-oldest/bin/python -m pytest $(TWO) tests/models tests/chat tests/runtime tests/checkpoint tests/compress

# On the real exo that EXO_SRC, EXO_71_SRC or EXO_LEGACY_SRC point at (tests/plugin/standin/README.md), and exo's own tests beside it.
test-exo: .venv-test/done
	.venv-test/bin/python -m pytest -m exo tests/plugin
	if [ -n "$$EXO_SRC" ]; then .venv-test/bin/python tests/plugin/standin/own_suite.py; fi

# The real clients of agents (node 20 or later is needed; Kimi Code gets its own), which `make test` uses too when they are there.
agents:
	mkdir -p .agents
	cd .agents && npm install --silent --no-fund --no-audit @moonshot-ai/kimi-code @openai/codex @anthropic-ai/claude-code opencode-ai node@24
	cd .agents && { npm install-scripts approve --all >/dev/null 2>&1 || true; } && npm rebuild --silent  # newer npm asks first
	$(PYTHON) -m venv .agents/python
	.agents/python/bin/python -m pip install --quiet --disable-pip-version-check litellm openai-agents "pydantic-ai-slim[openai,anthropic]"

test-agents: .venv-test/done
	.venv-test/bin/python -m pytest -m agents tests/serve/agents

# A Chromium for the tests of the page, which skip without one. Where there is neither one nor a way to install it, that is said.
browser:
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || { \
	  echo "installing Chromium for the tests of the page"; \
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-noto-cjk; } >/dev/null 2>&1 \
	  || echo "no Chromium, and none can be installed here: the tests of the page are skipped"; }

# The tests, and how much of the package they run, stage processes too; the floor is in pyproject.toml.
coverage: .venv-test/done
	.venv-test/bin/python -m pytest $(TWO) --cov --cov-report=term:skip-covered

lint: .venv-test/done
	.venv-test/bin/ruff check .
	.venv-test/bin/ruff format --check .

types: .venv-test/done
	.venv-test/bin/mypy

docs: .venv-test/done
	NO_MKDOCS_2_WARNING=1 .venv-test/bin/mkdocs build --quiet --strict
	@echo "the pages are in build/site"

reference: .venv-test/done
	.venv-test/bin/python -m exo_kimi.cli.reference > docs/reference/cli.md

# A wheel, installed where no source tree is: it says its version, and the tiny Kimi in it answers.
wheel-check: .venv-test/done
	rm -rf build/wheel
	.venv-test/bin/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir build/wheel .
	$(PYTHON) -m venv build/wheel/venv
	build/wheel/venv/bin/python -m pip install --quiet --disable-pip-version-check build/wheel/*.whl
	cd build/wheel && env -u PYTHONPATH venv/bin/exo-kimi --version && env -u PYTHONPATH venv/bin/exo-kimi demo --once --port 0

clean:
	rm -rf .venv .venv-test .venv-oldest build .coverage .coverage.*

.venv/done: EXTRA =
.venv-test/done: EXTRA = [test,docs]
.venv-oldest/done: EXTRA = [test]
.venv-oldest/done: CONSTRAINTS = -c tests/oldest.txt

.venv/done .venv-test/done .venv-oldest/done: pyproject.toml tests/oldest.txt
	@test -n "$(PYTHON)" || { echo "exo-kimi needs Python 3.11, 3.12 or 3.13; none was found. Try: make PYTHON=/path/to/python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "$(PYTHON) cannot make environments; on Debian: apt-get install python3-venv"; exit 1; }
	rm -rf $(@D)
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -e ".$(EXTRA)" $(CONSTRAINTS)
	@touch $@
