//! `POST /v1/completions`: writes the response as one object or as chunks.

use super::{
    completion::{Choice, Completion},
    response::{CompletionChoice, CompletionLogprobs, CompletionObject, PromptLogprobList, TextOffset},
    sse::{EventWriter, write_done, write_event},
};
use crate::relay::emit::Finish;

const OBJECT: &str = "text_completion";

/// Writes a complete response that is not streamed, with the echoed prompt in front of each text.
pub fn object(completion: &mut Completion) -> serde_json::Result<Vec<u8>> {
    for choice in &mut completion.choices {
        if let Some(echo) = &completion.prompt_texts[choice.prompt] {
            choice.delta.text.insert_str(0, echo);
        }
    }
    let names = completion.names();
    let params = &completion.params;
    let choices: Vec<CompletionChoice<'_>> = completion
        .choices
        .iter()
        .enumerate()
        .map(|(index, choice)| {
            let first_of_prompt = &completion.choices[choice.prompt * params.n as usize];
            let prompt_ids = &completion.tasks[choice.prompt].ids;
            CompletionChoice {
                index: index as u32,
                text: &choice.delta.text,
                logprobs: params.top_logprobs.map(|top| plain_logprobs(completion, choice, first_of_prompt, top)),
                finish_reason: finish_reason(completion, choice),
                stop_reason: choice.stop_reason(),
                prompt_logprobs: params.prompt_logprobs.map(|top| PromptLogprobList {
                    positions: &first_of_prompt.prompt_logprobs,
                    top,
                    names,
                }),
                prompt_token_ids: params.return_token_ids.then_some(prompt_ids),
                token_ids: params.return_token_ids.then_some(choice.delta.token_ids.as_slice()),
            }
        })
        .collect();
    serde_json::to_vec(&CompletionObject {
        id: &completion.id,
        object: OBJECT,
        created: completion.created,
        model: &completion.model,
        choices,
        usage: Some(completion.usage()),
    })
}

fn finish_reason(completion: &Completion, choice: &Choice) -> Option<&'static str> {
    if completion.params.echo_only {
        return Some(Finish::Length.as_str());
    }
    choice.finish.map(Finish::as_str)
}

fn plain_logprobs<'a>(
    completion: &'a Completion,
    choice: &Choice,
    first_of_prompt: &Choice,
    top: u32,
) -> CompletionLogprobs<'a> {
    let names = completion.names();
    let mut logprobs = CompletionLogprobs::default();
    let mut offset = completion.params.text_offset();
    if completion.params.echo {
        // the echoed prompt has no special tokens
        let mut in_prompt = TextOffset::new(completion.params.emit.tokenizer.as_ref(), true);
        let end = offset;
        if let Some(first) = completion.tasks[choice.prompt].ids.iter().next() {
            logprobs.push_unknown(first, &mut in_prompt, names);
        }
        for position in &first_of_prompt.prompt_logprobs {
            logprobs.push(position, top, &mut in_prompt, names);
        }
        offset = in_prompt.followed_by(end);
    }
    for position in &choice.delta.logprobs {
        logprobs.push(position, top, &mut offset, names);
    }
    logprobs.clamp_offsets(&choice.delta.text);
    logprobs
}

/// Writes the chunks of a streamed response.
#[derive(Default)]
pub struct CompletionWriter {
    finished: usize,
    ids_sent: Vec<bool>,
}

impl EventWriter for CompletionWriter {
    fn begin(&mut self, completion: &mut Completion, _out: &mut Vec<u8>) {
        self.ids_sent = vec![!completion.params.return_token_ids; completion.choices.len()];
        for choice in &mut completion.choices {
            if let Some(echo) = &completion.prompt_texts[choice.prompt] {
                choice.delta.text.push_str(echo);
            }
        }
    }

    fn progress(&mut self, completion: &mut Completion, number: usize, out: &mut Vec<u8>) {
        let mut text_offset = std::mem::take(&mut completion.choices[number].text_offset);
        let choice = &completion.choices[number];
        if choice.delta.is_empty() && choice.finish.is_none() {
            completion.choices[number].text_offset = text_offset;
            return;
        }
        self.finished += usize::from(choice.finish.is_some());
        let names = completion.names();
        let logprobs = completion.params.top_logprobs.filter(|_| !choice.delta.logprobs.is_empty()).map(|top| {
            let mut logprobs = CompletionLogprobs::default();
            for position in &choice.delta.logprobs {
                logprobs.push(position, top, &mut text_offset, names);
            }
            logprobs
        });
        let prompt_ids = &completion.tasks[choice.prompt].ids;
        let send_ids = !std::mem::replace(&mut self.ids_sent[number], true);
        let chunk_choice = CompletionChoice {
            index: number as u32,
            text: &choice.delta.text,
            logprobs,
            finish_reason: choice.finish.and_then(|_| finish_reason(completion, choice)),
            stop_reason: choice.stop_reason(),
            prompt_logprobs: None,
            prompt_token_ids: send_ids.then_some(prompt_ids),
            token_ids: completion.params.return_token_ids.then_some(choice.delta.token_ids.as_slice()),
        };
        let mut chunk = chunk(completion, [chunk_choice]);
        let last_for_mistral =
            completion.mistral_client() && completion.is_over() && self.finished == completion.choices.len();
        if completion.params.continuous_usage || last_for_mistral {
            chunk.usage = Some(completion.usage());
        }
        write_event(&chunk, out);
        let choice = &mut completion.choices[number];
        choice.text_offset = text_offset;
        choice.delta.clear();
    }

    fn end(&mut self, completion: &mut Completion, out: &mut Vec<u8>) {
        if completion.params.include_usage {
            let mut chunk = chunk(completion, [] as [CompletionChoice<'_>; 0]);
            chunk.usage = Some(completion.usage());
            write_event(&chunk, out);
        }
        write_done(out);
    }
}

fn chunk<C>(completion: &Completion, choices: C) -> CompletionObject<'_, C> {
    CompletionObject {
        id: &completion.id,
        object: OBJECT,
        created: completion.created,
        model: &completion.model,
        choices,
        usage: None,
    }
}
