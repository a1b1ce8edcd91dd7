// The list of conversations

import { $, closeSide, copyOf, element } from './dom.js';
import { handlers } from './handlers.js';
import { state } from './state.js';
import { conversations, isEmpty, save, title } from './store.js';

export function showTitle() {
  document.title = isEmpty(state.current) ? 'bitnet' : `${title(state.current)} · bitnet`;
  $('heading').textContent = title(state.current);
}

/** The list of conversations, the newest first. */
export function showList() {
  const places = $('list');
  if (places.querySelector('input')) return; // One is being renamed.
  const focus = document.activeElement.dataset.focus;
  const newest = [...conversations.values()].sort((a, b) => b.updated - a.updated);
  places.replaceChildren(...newest.map((conversation) => {
    const made = copyOf('t-entry');
    const [link, rename, remove] = made.children;
    const name = title(conversation);
    made.classList.toggle('current', conversation === state.current);
    link.href = `#${conversation.id}`;
    link.textContent = link.title = name;
    link.classList.toggle('busy', Boolean(conversation.run));
    if (conversation === state.current) link.setAttribute('aria-current', 'page');
    link.onclick = closeSide;
    rename.onclick = () => startRename(conversation, link);
    remove.onclick = () => handlers.askToDelete(conversation);
    [link, rename, remove].forEach((control, i) => (control.dataset.focus = `${conversation.id} ${i}`));
    rename.setAttribute('aria-label', (rename.title = `Rename “${name}”`));
    remove.setAttribute('aria-label', (remove.title = `Delete “${name}”`));
    return made;
  }));
  if (focus) places.querySelector(`[data-focus="${focus}"]`)?.focus();
}

function startRename(conversation, link) {
  const field = element('input');
  field.value = title(conversation);
  field.maxLength = 200;
  field.setAttribute('aria-label', 'Name of the conversation');
  let done = false;
  const finish = (keep, focus) => {
    if (done) return;
    done = true;
    if (keep) {
      conversation.title = field.value.trim();
      save(conversation);
    }
    field.remove();
    showList();
    showTitle();
    if (focus) $('list').querySelector(`[data-focus="${conversation.id} 1"]`)?.focus();
  };
  field.onblur = () => finish(true, false);
  field.onkeydown = (event) => {
    if (event.isComposing || !['Enter', 'Escape'].includes(event.key)) return;
    event.stopPropagation();
    event.preventDefault(); // Otherwise the key also acts on what gets the focus.
    finish(event.key === 'Enter', true);
  };
  link.replaceWith(field);
  field.focus();
  field.select();
}
