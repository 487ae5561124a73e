# Shortcuts for scripts: just TASK. The commands also work without just.

# formats everything
fmt:
    cargo fmt --all

# all lints of CI
lint:
    scripts/test lint
    cargo clippy --workspace --all-targets --locked -- -D warnings

# unit and integration tests
test:
    scripts/test rust

# end-to-end tests: real etcd, real clients
e2e:
    scripts/test e2e

# all checks of CI
ci:
    .ci/run

# the documentation as a site, links checked
docs:
    scripts/docs build

# a whole cluster on this machine
quickstart:
    scripts/quickstart

# benchmarks of the router and of the CPU engine
bench:
    scripts/bench/router
    scripts/bench/engine-cpu
    scripts/bench/api
