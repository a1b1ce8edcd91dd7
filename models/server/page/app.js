// The chat page of `bitnet serve`: plain JavaScript, no libraries, no build step. This file says what the controls do, and
// starts the page.

import { again, askToDelete, begin, chooseModel, continueText, edit, focusField, keep, loadModels, openFromAddress, send, sends } from './actions.js';
import { changeSetting, openSettings, showReceipt } from './dialogs.js';
import { $, closeSide, fit, narrow, notice, openSide } from './dom.js';
import { handlers } from './handlers.js';
import { showList } from './list.js';
import { stop } from './run.js';
import { state } from './state.js';
import { PREFIX, SAMPLING, conversations, local, newConversation, readConversation, readConversations, readInfo, save, saveSettings, settings } from './store.js';
import { paint, show, toEnd } from './view.js';

Object.assign(handlers, { again, askToDelete, edit, showReceipt });

$('send').onclick = send;
$('message').onkeydown = (event) => {
  if (!sends(event)) return;
  event.preventDefault();
  if (!state.current.run) send();
};
$('message').oninput = () => {
  state.current.draft = $('message').value;
  fit($('message'));
};
$('continue').onclick = continueText;
$('another').onclick = () => again(state.current);
$('undo').onclick = () => {
  const [message] = state.current.messages;
  message.content = message.content.slice(0, message.info.before);
  message.info = readInfo();
  save(state.current);
  show(state.current);
  $('text').focus();
};
$('text').oninput = () => {
  const [message] = state.current.messages;
  message.content = $('text').value;
  if (message.content && !conversations.has(state.current.id)) keep(state.current);
  // What was known of the continuation no longer fits the text.
  message.info = readInfo();
  state.current.updated = Date.now();
  save(state.current);
  showList();
  paint();
  $('undo').disabled = $('another').disabled = true;
};
$('text').onkeydown = (event) => {
  if (event.key !== 'Enter' || !(event.ctrlKey || event.metaKey)) return;
  event.preventDefault();
  if (!state.current.run) continueText();
};
for (const box of [$('log'), $('text')]) {
  box.onscroll = () => {
    state.atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 48;
    $('to-end').hidden = state.atEnd;
  };
}
$('to-end').onclick = () => {
  toEnd();
  focusField();
};
$('new').onclick = $('new-small').onclick = () => begin();
$('menu').onclick = openSide;
$('shade').onclick = closeSide;
narrow.onchange = closeSide;
$('model').onchange = () => chooseModel($('model').value);
$('settings-open').onclick = $('system-open').onclick = openSettings;
$('system').oninput = () => {
  state.current.system = settings.system = $('system').value;
  saveSettings();
  save(state.current);
};
$('settings').onclose = () => show(state.current);
for (const name of SAMPLING) $(name).oninput = () => changeSetting($(name));
$('settings-reset').onclick = () => {
  for (const name of SAMPLING) {
    $(name).value = '';
    changeSetting($(name));
  }
};
$('key-use').onclick = () => $('key').close('use');
$('key-value').onkeydown = (event) => {
  if (event.key !== 'Enter') return;
  event.preventDefault();
  $('key').close('use');
};
for (const button of document.querySelectorAll('dialog .close')) button.onclick = () => button.closest('dialog').close();
$('notice-close').onclick = () => notice('');
document.onkeydown = (event) => {
  if (event.key !== 'Escape' || document.querySelector('dialog[open]')) return;
  if ($('side').classList.contains('open')) closeSide();
  else stop();
};
window.onhashchange = openFromAddress;
// A page that closes stops its answers, or the browser would break them, and they would count as failed.
window.onbeforeunload = () => conversations.forEach((conversation) => conversation.run?.control.abort());
window.onpagehide = () => conversations.forEach((conversation) => conversation.run && save(conversation));
// Another tab wrote. Texts that this tab is working on stay.
window.onstorage = ({ key: changed, newValue }) => {
  if (!changed?.startsWith(PREFIX)) return;
  const id = changed.slice(PREFIX.length);
  if (conversations.get(id)?.run) return;
  const found = newValue && readConversation(id, newValue);
  if (found) conversations.set(id, found);
  else conversations.delete(id);
  if (id === state.current.id && found) show(found);
  else showList();
};

readConversations();
show(conversations.get(location.hash.slice(1)) ?? newConversation('chat'));
if (!local) notice('This browser keeps no data for this page. Conversations end when the page closes.');
loadModels();
