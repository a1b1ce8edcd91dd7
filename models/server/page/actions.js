// What users do with conversations

import { $, closeSide, copyOf, fit, narrow, notice, say, touch } from './dom.js';
import { showList } from './list.js';
import { Failure, request } from './requests.js';
import { run, stop } from './run.js';
import { kindOf, modelOf, state } from './state.js';
import { conversations, count, forget, isEmpty, newConversation, readInfo, save, saveSettings, settings, title } from './store.js';
import { questionAgain, show } from './view.js';

/** On a phone, focus would open the keyboard over the answer. */
export const focusField = () => touch.matches || $(state.current.kind === 'text' ? 'text' : 'message').focus();

export function begin(kind = state.current?.kind ?? 'chat') {
  if (location.hash) history.pushState(null, '', location.pathname + location.search);
  notice('');
  show(newConversation(kind));
  closeSide();
  focusField();
}

/** Shows the conversation that the address names, or a new one. */
export function openFromAddress() {
  const found = conversations.get(location.hash.slice(1));
  if (found && found === state.current) return;
  notice('');
  const model = state.models.find(({ id }) => id === settings.model) ?? state.models[0];
  show(found ?? newConversation(model ? kindOf(model) : 'chat'));
  closeSide();
  focusField();
}

/** Puts a conversation into the list and the address, so that it is there after a reload. */
export function keep(conversation) {
  conversations.set(conversation.id, conversation);
  if (location.hash.slice(1) !== conversation.id) history.replaceState(null, '', `#${conversation.id}`);
}

async function start(conversation) {
  keep(conversation);
  conversation.retryAt = 0;
  focusField();
  const model = await run(conversation);
  if (model && !(model.loaded && model.chat !== undefined)) await lookAgain(conversation, model);
}

/** A model was loaded for an answer: its kind may turn out to be another one than that of the conversation. */
async function lookAgain(conversation, model) {
  // Now the server knows more of this model. If it turns out to have no chat template, the question becomes a text.
  await loadModels();
  if (kindOf(state.models.find(({ id }) => id === model.id) ?? model) === conversation.kind || conversation !== state.current || conversation.messages.length > 2) return;
  forget(conversation);
  const [question] = conversation.messages;
  begin('text');
  state.current.messages[0].content = question.content;
  keep(state.current);
  save(state.current);
  show(state.current);
  notice(`${model.id} has no chat template. It continues texts.`);
}

/** Adds the user's message and an answer that is still empty. */
function ask(conversation, content) {
  conversation.messages.push({ role: 'user', content, info: readInfo() }, { role: 'assistant', content: '', info: readInfo() });
  start(conversation);
}

/** Computes the last answer, or the last continuation, once more. */
export async function again(conversation) {
  const message = conversation.messages.at(-1);
  if (conversation.run) return;
  if (!modelOf(conversation)) return loadModels();
  const { content, info } = message;
  message.content = conversation.kind === 'text' ? content.slice(0, info.before) : '';
  const without = message.content;
  await start(conversation);
  // If nothing came, the earlier answer stays.
  if (!message.info.error || message.content !== without || content === without) return;
  message.content = content;
  message.info = { ...info, error: message.info.error };
  save(conversation);
  if (conversation === state.current) show(conversation);
}

export function send() {
  if (state.current.run) return stop();
  const content = $('message').value.trim();
  if (!content) return $('message').focus();
  if (!modelOf(state.current)) return loadModels();
  $('message').value = state.current.draft = '';
  fit($('message'));
  ask(state.current, content);
}

export function edit(conversation, message, i, made) {
  if (conversation.run) return;
  const form = copyOf('t-edit');
  const field = form.querySelector('textarea');
  const end = () => questionAgain(conversation, message, i, made).querySelector('.edit').focus();
  const resend = () => {
    const content = field.value.trim();
    if (!content || conversation.run) return field.focus();
    if (!modelOf(conversation)) return loadModels();
    conversation.messages.length = i;
    ask(conversation, content);
  };
  field.value = message.content;
  field.oninput = () => fit(field);
  field.onkeydown = (event) => {
    if (sends(event)) resend();
    else if (event.key === 'Escape') end();
    else return;
    event.preventDefault();
    event.stopPropagation();
  };
  form.querySelector('.cancel').onclick = end;
  form.querySelector('.save').onclick = resend;
  made.replaceChildren(form);
  fit(field);
  field.focus();
}

/** Whether a key press sends the message. A phone's keyboard has no Shift+Enter, so there Enter starts a line. */
export function sends(event) {
  return event.key === 'Enter' && !event.isComposing && (event.ctrlKey || event.metaKey || (!event.shiftKey && !touch.matches));
}

export function continueText() {
  if (state.current.run) return stop();
  if (!$('text').value) return $('text').focus();
  if (!modelOf(state.current)) return loadModels();
  state.atEnd = true;
  start(state.current);
}

export function askToDelete(conversation) {
  $('delete-what').textContent = `“${title(conversation)}” cannot be brought back.`;
  $('delete-yes').onclick = () => {
    $('delete').close();
    conversation.run?.control.abort();
    forget(conversation);
    if (conversation === state.current) begin();
    else showList();
    say('Deleted.');
    (narrow.matches ? $('menu') : $('new')).focus();
  };
  $('delete').showModal();
}

export function chooseModel(id) {
  const model = state.models.find((one) => one.id === id);
  settings.model = id;
  saveSettings();
  notice('');
  if (!isEmpty(state.current) && kindOf(model) === state.current.kind) {
    state.current.model = id;
    save(state.current);
    show(state.current);
  } else begin(kindOf(model));
}

export async function loadModels() {
  try {
    const { data } = await (await request('v1/models')).json();
    state.models = data.filter((model) => typeof model?.id === 'string').map(({ id, bitnet }) => ({ id, chat: bitnet?.chat, context: count(bitnet?.context), loaded: bitnet?.loaded !== false }));
    if (!state.models.length) throw new Failure('The server has no model.');
  } catch (error) {
    state.models = [];
    notice(error instanceof Failure ? error.message : 'The server’s list of models cannot be read.', loadModels);
  }
  $('model').replaceChildren(...(state.models.length ? state.models : [{ id: 'No model' }]).map(({ id }) => new Option(id)));
  $('model').disabled = !state.models.length;
  if (!state.models.length) return;
  const kind = kindOf(state.models.find(({ id }) => id === settings.model) ?? state.models[0]);
  if (isEmpty(state.current) && kind !== state.current.kind) begin(kind);
  else show(state.current);
  if (document.activeElement === document.body) focusField();
}
