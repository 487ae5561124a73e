//! What the system says of this process, under the names that Prometheus' own clients use, and which release runs.

use std::fmt::Write as _;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use super::log_writer;

/// Linux counts processor time in hundredths of a second for user space, on every architecture.
const TICKS_PER_SECOND: f64 = 100.0;

/// Whether gRPC is plain text beyond this host (`grpc.insecure`).
static GRPC_INSECURE: AtomicBool = AtomicBool::new(false);

/// Says in the metrics whether gRPC is plain text beyond this host.
pub fn set_grpc_insecure(is_insecure: bool) {
    GRPC_INSECURE.store(is_insecure, Ordering::Relaxed);
}

/// Adds this process's metrics to a text that [`end`] has not yet closed. What can't be read is left out.
pub fn write(text: &mut String, version: &str) {
    let _ = writeln!(
        text,
        "# HELP bora_build Release of this process.\n# TYPE bora_build info\nbora_build_info{{version=\"{version}\"}} 1"
    );
    let mut gauge = |name: &str, kind: &str, help: &str, value: Option<f64>| {
        let Some(value) = value else { return };
        let suffix = if kind == "counter" { "_total" } else { "" };
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n{name}{suffix} {value}");
    };
    let insecure = f64::from(u8::from(GRPC_INSECURE.load(Ordering::Relaxed)));
    let help = "1 if gRPC is plain text beyond this host (grpc.insecure).";
    gauge("bora_grpc_insecure", "gauge", help, Some(insecure));
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // fields after the command's name, which may hold spaces
    let fields: Vec<&str> = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_whitespace().collect();
    let ticks = |index: usize| fields.get(index).and_then(|field| field.parse::<f64>().ok());
    let cpu = ticks(11).zip(ticks(12)).map(|(user, system)| (user + system) / TICKS_PER_SECOND);
    gauge("process_cpu_seconds", "counter", "User and system time.", cpu);
    gauge(
        "process_resident_memory_bytes",
        "gauge",
        "Resident memory.",
        status("VmRSS:").map(|kilobytes| kilobytes * 1024.0),
    );
    gauge("process_threads", "gauge", "Threads.", status("Threads:"));
    let open = std::fs::read_dir("/proc/self/fd").ok().map(|entries| entries.count() as f64);
    gauge("process_open_fds", "gauge", "Open files and sockets.", open);
    gauge("process_max_fds", "gauge", "Files and sockets that may be open.", max_fds());
    let lost = log_writer::lost_lines() as f64;
    gauge("bora_log_lines_lost", "counter", "Log lines that could not be written.", Some(lost));
    gauge("process_start_time_seconds", "gauge", "Start, in seconds since 1970.", start_time(ticks(19)));
}

/// Closes a text in OpenMetrics' form.
pub fn end(text: &mut String) {
    text.push_str("# EOF\n");
}

fn status(field: &str) -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(field))?;
    line.split_whitespace().next()?.parse().ok()
}

fn max_fds() -> Option<f64> {
    let limits = std::fs::read_to_string("/proc/self/limits").ok()?;
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_whitespace().next()?.parse().ok()
}

fn start_time(ticks_after_boot: Option<f64>) -> Option<f64> {
    static BOOTED_AT: OnceLock<Option<f64>> = OnceLock::new();
    let booted_at = *BOOTED_AT.get_or_init(|| {
        let stat = std::fs::read_to_string("/proc/stat").ok()?;
        stat.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()
    });
    Some(booted_at? + ticks_after_boot? / TICKS_PER_SECOND)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::exposition;

    #[test]
    fn this_process_has_memory_files_and_a_start() {
        let mut text = String::new();
        write(&mut text, "1.2.3");
        end(&mut text);
        let families = exposition::parse(&text);
        let value = |name: &str| families.iter().find(|family| family.name == name).unwrap().samples[0].value;
        assert!(value("process_resident_memory_bytes") > 1e6);
        assert!(value("process_open_fds") >= 3.0 && value("process_max_fds") > value("process_open_fds"));
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs_f64();
        assert!((0.0..86_400.0).contains(&(now - value("process_start_time_seconds"))));
        assert!(text.contains("bora_build_info{version=\"1.2.3\"} 1") && text.ends_with("# EOF\n"));
    }
}
