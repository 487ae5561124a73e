# just TASK; each is one line that works without just, too.

# formats everything
fmt:
    cargo fmt --all

# lints as CI does
lint:
    cargo clippy --workspace --all-targets --locked -- -D warnings

# unit and integration tests
test:
    scripts/test rust

# end-to-end tests: real etcd, real clients
e2e:
    scripts/test e2e

# everything CI runs
ci:
    .ci/run

# the documentation as a site, links checked
docs:
    scripts/docs build

# the whole cluster on this machine
quickstart:
    scripts/quickstart

# benchmarks of the router and of the CPU engine
bench:
    scripts/bench/router
    scripts/bench/engine-cpu
    scripts/bench/api
