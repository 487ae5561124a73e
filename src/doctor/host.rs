//! The node itself: files that may be open, shared memory, memory, cores.

use bora_common::config::HostPort;

use super::Check;
use crate::config::Config;

/// A router with thousands of streams has a socket for each.
const FILES_WANTED: u64 = 65_536;
/// Below this, a few hundred streams are the end.
const FILES_NEEDED: u64 = 4_096;
/// What NCCL takes for a handful of GPUs.
const SHARED_MEMORY_WANTED: u64 = 1 << 30;

pub(super) fn check(config: Option<&Config>) -> Vec<Check> {
    let ranks = config.map_or(1, |config| config.worker.local_ranks().len());
    let mut checks = vec![open_files(), shared_memory(ranks), clock()];
    checks.push(memory(config));
    checks.extend(config.and_then(|config| address(&config.worker.advertise)));
    checks
}

fn open_files() -> Check {
    const NAME: &str = "open files";
    let limits = std::fs::read_to_string("/proc/self/limits").unwrap_or_default();
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"));
    let Some(soft) = line.and_then(|line| line.split_whitespace().next()) else {
        return Check::skipped(NAME, "/proc/self/limits can't be read");
    };
    let fix = "raise it: LimitNOFILE= of systemd, `ulimit -n`, or the container runtime's default";
    match soft.parse::<u64>() {
        Ok(soft) if soft < FILES_NEEDED => {
            Check::failure(NAME, format!("{soft} may be open: every stream is one"), fix)
        }
        Ok(soft) if soft < FILES_WANTED => {
            Check::warning(NAME, format!("{soft} may be open, {FILES_WANTED} are wanted for thousands of streams"), fix)
        }
        // a number above, or `unlimited`
        _ => Check::good(NAME, format!("{soft} may be open")),
    }
}

fn shared_memory(ranks: usize) -> Check {
    const NAME: &str = "shared memory";
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap_or_default();
    let mount = mounts.lines().find(|line| line.split(' ').nth(1) == Some("/dev/shm"));
    let Some(options) = mount.and_then(|line| line.split(' ').nth(3)) else {
        return Check::warning(NAME, "/dev/shm is not mounted", "mount a tmpfs there: NCCL needs it between processes");
    };
    let Some(bytes) = options.split(',').find_map(|option| option.strip_prefix("size=")).and_then(size) else {
        return Check::good(NAME, "/dev/shm may take half of the memory");
    };
    let found = format!("/dev/shm has {} MiB", bytes >> 20);
    if bytes < SHARED_MEMORY_WANTED && ranks > 1 {
        return Check::warning(
            NAME,
            format!("{found}, {ranks} ranks here want at least {} MiB", SHARED_MEMORY_WANTED >> 20),
            "a larger one: --shm-size of docker, an emptyDir of medium Memory (workers.sharedMemory of the chart)",
        );
    }
    Check::good(NAME, found)
}

/// A size as mount options write it: `65536k`, `8g`, bytes.
fn size(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|character: char| character.is_ascii_alphabetic());
    let shift = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_shl(shift)
}

/// Leases and traces compare clocks of several nodes; the kernel knows whether somebody keeps this one right.
fn clock() -> Check {
    const NAME: &str = "clock";
    // systemd-timesyncd and chrony leave these where they run
    let kept = [
        "/run/systemd/timesync/synchronized",
        "/run/chrony/chronyd.sock",
        "/var/run/chrony/chronyd.sock",
        "/run/ntpd.pid",
    ];
    match kept.iter().find(|path| std::fs::exists(path).unwrap_or(false)) {
        Some(path) => Check::good(NAME, format!("kept right ({path})")),
        None => Check::skipped(NAME, "nothing here tells whether it is kept right (in a container its host does that)"),
    }
}

fn memory(config: Option<&Config>) -> Check {
    const NAME: &str = "memory";
    let info = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kilobytes = |name: &str| -> Option<u64> {
        info.lines().find_map(|line| line.strip_prefix(name))?.split_whitespace().next()?.parse().ok()
    };
    let Some((available, total)) = kilobytes("MemAvailable:").zip(kilobytes("MemTotal:")) else {
        return Check::skipped(NAME, "/proc/meminfo can't be read");
    };
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let gib = |kilobytes: u64| kilobytes as f64 / f64::from(1 << 20);
    let found = format!("{:.1} of {:.1} GiB available, {cores} cores", gib(available), gib(total));
    let conversations = config.map_or(0, |config| config.router.conversation_cache_bytes as u64) >> 10;
    if available < conversations {
        let fix = "a lower router.conversation_cache_bytes, or more memory";
        return Check::warning(NAME, format!("{found}: less than the router's conversation cache may take"), fix);
    }
    Check::good(NAME, found)
}

/// What others are given must lead to this node.
fn address(advertised: &Option<HostPort>) -> Option<Check> {
    use std::net::ToSocketAddrs as _;
    const NAME: &str = "worker.advertise";
    let address = advertised.as_ref()?;
    let fix = "a name that routers resolve, or an address";
    Some(match (address.host.as_str(), address.port).to_socket_addrs() {
        Ok(mut found) => match found.next() {
            Some(one) => Check::good(NAME, format!("{address} is {}", one.ip())),
            None => Check::failure(NAME, format!("{address} has no address"), fix),
        },
        Err(error) => Check::failure(NAME, format!("{address}: {error}"), fix),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_mount_writes_them() {
        assert_eq!(size("65536k"), Some(64 << 20));
        assert_eq!((size("8g"), size("123"), size("x"), size("1y")), (Some(8 << 30), Some(123), None, None));
    }
}
