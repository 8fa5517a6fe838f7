//! Writes of an attempt that was lost with its worker: ten thousand of them, whatever they say and whenever they come, change
//! nothing of the build, and what its present attempt reports counts.

use helix_core::Reply;
use helix_core::command::{Command, Outcome};
use helix_model::{ErrorCode, Reason};

use crate::story::*;

const BUILDS: u64 = 100;
const WRITES_OF_A_BUILD: u64 = 100;

/// Random enough, and the same each time (xorshift64).
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % sides
    }

    fn pick<'a>(&mut self, of: &[&'a str]) -> &'a str {
        of[usize::try_from(self.roll(of.len() as u64)).unwrap()]
    }
}

fn outcome(dice: &mut Dice) -> Outcome {
    let reasons = [Reason::Exit, Reason::DiskFull, Reason::Oom, Reason::WorkerLost, Reason::Timeout];
    match dice.roll(2) {
        0 => success(),
        _ => failed(reasons[usize::try_from(dice.roll(reasons.len() as u64)).unwrap()]),
    }
}

/// Any write but those that are the present attempt's (2, of w2 in the life that it was given to) or the lost one's log.
fn stale_write(dice: &mut Dice) -> Command {
    loop {
        let number = dice.roll(5);
        let key = format!("b.0.{number}");
        let name = dice.pick(&["w1", "w1", "w1", "w2", "w3", "w4"]);
        let life = dice.pick(&["data1.boot1", "data1.boot2", "data2.boot1"]);
        let is_present = number == 2 && name == "w2";
        let is_its_life = is_present && life == "data1.boot1";
        let is_lost = number == 1 && name == "w1";
        match dice.roll(5) {
            0 | 1 | 3 if is_its_life => {}
            0 => return finish(&key, name, life, outcome(dice)),
            1 => return unproven(finish(&key, name, life, failed(Reason::Exit))),
            2 if !is_present => return pin_source(&key, name, &"c0ffee11".repeat(5)),
            3 => return record_image(&key, name, life, image(7)),
            4 if !is_present && !is_lost => return seal(&key, name),
            _ => {}
        }
    }
}

#[test]
fn ten_thousand_stale_writes_after_a_loss_are_all_refused() {
    let mut dice = Dice(0x9E37_79B9_7F4A_7C15);
    let mut refused = 0;
    for _ in 0..BUILDS {
        let mut story = Story::new();
        for name in ["w1", "w2", "w3"] {
            story.worker(name, 1);
        }
        story.submit("b");
        assert_eq!(story.assign("b.0.1", "w1"), Reply::Done);
        assert_eq!(story.apply(lose("w1", "data1.boot1")), Reply::Done);
        // It may be back as it was, in another life, or not at all; and be told late that it was lost.
        match dice.roll(3) {
            0 => drop(story.worker("w1", 1)),
            1 => drop(story.worker_life("w1", "data1.boot2", offer(1))),
            _ => {}
        }
        let mut has_second = false;
        for write in 0..WRITES_OF_A_BUILD {
            // Before the second attempt too: then no attempt may write.
            if !has_second && write >= dice.roll(WRITES_OF_A_BUILD / 2) {
                story.wait(3_600_000);
                assert_eq!(story.assign("b.0.2", "w2"), Reply::Done);
                has_second = true;
            }
            let (command, before) = (stale_write(&mut dice), story.record("b"));
            match story.apply(command.clone()) {
                Reply::Rejected(rejection) => {
                    let report = matches!(command, Command::FinishAttempt(_));
                    assert!(!report || rejection.code() == ErrorCode::StaleAttempt, "{command:?}: {rejection:?}");
                }
                other => panic!("{command:?} was taken: {other:?}"),
            }
            assert_eq!(story.record("b"), before, "{command:?}");
            refused += 1;
        }
        assert!(has_second, "half of the writes at most come before the second attempt");
        assert_eq!(story.finish("b.0.2", "w2", success()), Reply::Done);
        assert!(story.show("b").starts_with("succeeded: succeeded after 2"), "{}", story.show("b"));
    }
    assert_eq!(refused, 10_000);
}
