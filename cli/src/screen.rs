//! The terminal, lent to one verb: a screen of its own and keys without echo. Dropping it gives everything back.

use std::future::pending;
use std::io::{IsTerminal, Read as _, Write, stdin, stdout};

use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

/// The other screen, no cursor, and lines that are too long end at the edge.
const ENTER: &str = "\u{1b}[?1049h\u{1b}[?25l\u{1b}[?7l";
const LEAVE: &str = "\u{1b}[?7h\u{1b}[?25h\u{1b}[?1049l";
/// Of a terminal that does not know its height.
const LINES: usize = 24;
/// What Ctrl-C is where the terminal makes no signal of it.
const CONTROL_C: u8 = 3;

/// A terminal that shows nothing else.
pub(crate) struct Screen {
    /// How keys were read before, where they come from a terminal.
    before: Option<Termios>,
}

impl Screen {
    /// Takes the terminal.
    ///
    /// # Errors
    /// Where it cannot be written to.
    pub(crate) fn open() -> std::io::Result<Self> {
        let before = stdin().is_terminal().then(|| tcgetattr(stdin()).ok()).flatten();
        // From here on everything is given back, whatever fails.
        let this = Self { before };
        if let Some(before) = &this.before {
            let mut keys = before.clone();
            // Keys come one by one. Ctrl-Z would leave a screen that is not the shell's.
            keys.local_modes.remove(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG);
            tcsetattr(stdin(), OptionalActions::Now, &keys)?;
        }
        write(ENTER)?;
        Ok(this)
    }

    /// How many lines there are.
    pub(crate) fn height() -> usize {
        tcgetwinsize(stdout()).map(|size| usize::from(size.ws_row)).ok().filter(|rows| *rows > 0).unwrap_or(LINES)
    }

    /// Shows these lines and nothing else, without a flicker.
    ///
    /// # Errors
    /// Where the terminal has gone.
    pub(crate) fn draw(&self, lines: &[String]) -> std::io::Result<()> {
        // To the top; what a line does not reach is erased, and so is what stands below the last one.
        write(&format!("\u{1b}[H{}\u{1b}[K\u{1b}[J", lines.join("\u{1b}[K\r\n")))
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        // Nothing more can be done for a terminal that has gone.
        let _ = write(LEAVE);
        if let Some(before) = &self.before {
            let _ = tcsetattr(stdin(), OptionalActions::Now, before);
        }
    }
}

fn write(text: &str) -> std::io::Result<()> {
    let mut out = stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// Waits for `q`, Ctrl-C, or a signal that asks to end.
///
/// # Errors
/// Where signals cannot be listened for.
pub(crate) async fn asked_to_end() -> std::io::Result<()> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
        _ = hangup.recv() => {}
        () = key() => {}
    }
    Ok(())
}

/// Waits for a key that means the end; for ever, where no keys come.
async fn key() {
    if !stdin().is_terminal() {
        return pending().await;
    }
    let (pressed, end) = oneshot::channel();
    // Nobody can wait for a terminal's keys without a thread that does; it ends with the process.
    std::thread::spawn(move || {
        let mut keys = [0; 64];
        let is_end = |key: &u8| matches!(*key, b'q' | b'Q' | CONTROL_C);
        while let Ok(count @ 1..) = stdin().read(&mut keys) {
            if keys[..count].iter().any(is_end) {
                // Whoever listened may have been ended by a signal.
                let _ = pressed.send(());
                return;
            }
        }
    });
    if end.await.is_err() {
        pending().await
    }
}
