//! The terminal: the same tables, kept up to date. `q` ends it, arrows and page keys scroll, `r` shows or hides ranks.

use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::Duration;

use ratatui::Frame;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use ratatui::layout::{Alignment, Constraint, Layout};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Text};
use ratatui::widgets::{Cell, Paragraph, Row, Table as Grid};

use super::ask::Asker;
use super::table::{Table, is_text};
use super::view::View;

/// How often keys are looked at.
const KEYS: Duration = Duration::from_millis(100);
/// Rows of a page.
const PAGE: usize = 10;

#[derive(Default)]
struct Shown {
    view: Option<View>,
    trouble: Option<String>,
    scrolled: usize,
    hide_ranks: bool,
}

/// Shows until `q`, or until `count` looks (0 = without end).
pub(super) fn run(
    runtime: &tokio::runtime::Runtime,
    asker: Asker,
    interval: Duration,
    count: u64,
) -> anyhow::Result<()> {
    let (sender, looks) = sync_channel(1);
    let asking = runtime.spawn(async move {
        let mut before = None;
        loop {
            let outcome = asker.look().await;
            let message = match (&before, &outcome) {
                (Some(before), Ok(now)) => Some(Ok(View::new(before, now))),
                (None, Ok(now)) => Some(Ok(View::new(now, now))),
                (_, Err(error)) => Some(Err(format!("{error:#}"))),
            };
            if let Ok(now) = outcome {
                before = Some(now);
            }
            // a screen that has not yet taken the last one skips this one
            if let Some(message) = message
                && let Err(std::sync::mpsc::TrySendError::Disconnected(_)) = sender.try_send(message)
            {
                return;
            }
            tokio::time::sleep(interval).await;
        }
    });
    let outcome = ratatui::run(|terminal| {
        let mut shown = Shown::default();
        let mut seen = 0;
        loop {
            match looks.recv_timeout(KEYS) {
                Ok(Ok(view)) => {
                    (shown.view, shown.trouble) = (Some(view), None);
                    seen += 1;
                }
                // the last view stays
                Ok(Err(trouble)) => shown.trouble = Some(trouble),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            }
            terminal.draw(|frame| draw(frame, &shown))?;
            if (count > 0 && seen >= count) || !handle_keys(&mut shown)? {
                return Ok(());
            }
        }
    });
    asking.abort();
    outcome
}

/// False where it shall end.
fn handle_keys(shown: &mut Shown) -> anyhow::Result<bool> {
    while event::poll(Duration::ZERO)? {
        let Event::Key(key) = event::read()? else { continue };
        if key.kind != KeyEventKind::Press {
            continue;
        }
        let last = shown.view.as_ref().map_or(0, |view| view.groups.rows.len().saturating_sub(1));
        match key.code {
            KeyCode::Char('q') | KeyCode::Esc => return Ok(false),
            KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => return Ok(false),
            KeyCode::Char('r') => shown.hide_ranks = !shown.hide_ranks,
            KeyCode::Down => shown.scrolled = (shown.scrolled + 1).min(last),
            KeyCode::Up => shown.scrolled = shown.scrolled.saturating_sub(1),
            KeyCode::PageDown => shown.scrolled = (shown.scrolled + PAGE).min(last),
            KeyCode::PageUp => shown.scrolled = shown.scrolled.saturating_sub(PAGE),
            KeyCode::Home => shown.scrolled = 0,
            _ => {}
        }
    }
    Ok(true)
}

fn draw(frame: &mut Frame<'_>, shown: &Shown) {
    let Some(view) = &shown.view else {
        let text = shown.trouble.clone().unwrap_or_else(|| "asking the router".into());
        return frame.render_widget(Paragraph::new(text), frame.area());
    };
    let height = |table: &Table| if table.rows.is_empty() { 0 } else { table.rows.len() as u16 + 2 };
    let ranks = if shown.hide_ranks { 0 } else { height(&view.ranks) };
    let [summary, lines, groups, ranks, foot] = Layout::vertical([
        Constraint::Length(view.summary.len() as u16 + 1),
        Constraint::Length(height(&view.lines).min(6)),
        Constraint::Min(4),
        Constraint::Length(ranks.min(frame.area().height / 3)),
        Constraint::Length(1),
    ])
    .areas(frame.area());
    let mut text: Vec<Line<'_>> = view.summary.iter().map(|line| Line::from(line.as_str())).collect();
    if let Some(first) = text.first_mut() {
        *first = first.clone().style(Style::new().add_modifier(Modifier::BOLD));
    }
    frame.render_widget(Text::from(text), summary);
    frame.render_widget(grid(&view.lines, 0), lines);
    frame.render_widget(grid(&view.groups, shown.scrolled), groups);
    if !shown.hide_ranks {
        frame.render_widget(grid(&view.ranks, 0), ranks);
    }
    let keys = "q quit   arrows scroll   r ranks";
    let last = shown.trouble.as_ref().map_or(Line::from(keys).style(Style::new().fg(Color::DarkGray)), |trouble| {
        Line::from(trouble.as_str()).style(Style::new().fg(Color::Red))
    });
    frame.render_widget(last, foot);
}

fn grid(table: &Table, scrolled: usize) -> Grid<'_> {
    let align = |name: &str| if is_text(name) { Alignment::Left } else { Alignment::Right };
    let cells = |row: &[String]| -> Vec<Cell<'static>> {
        let named = row.iter().zip(&table.head);
        named
            .map(|(cell, name)| Cell::from(Line::from(cell.clone()).alignment(align(name)).style(color(cell))))
            .collect()
    };
    let head: Vec<String> = table.head.iter().map(ToString::to_string).collect();
    let rows: Vec<Row<'_>> = table.rows.iter().skip(scrolled).map(|row| Row::new(cells(row))).collect();
    let widths: Vec<Constraint> = table.widths().into_iter().map(|width| Constraint::Length(width as u16)).collect();
    Grid::new(rows, widths)
        .column_spacing(2)
        .header(Row::new(cells(&head)).style(Style::new().fg(Color::Cyan).add_modifier(Modifier::BOLD)))
}

fn color(cell: &str) -> Style {
    match cell {
        "ready" => Style::new().fg(Color::Green),
        "loading" | "draining" | "unlisted" => Style::new().fg(Color::Yellow),
        "unwatched" => Style::new().fg(Color::Red),
        _ => Style::new(),
    }
}
