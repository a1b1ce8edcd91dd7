// The page's elements, and what is told to its users. Texts of models and users are untrusted. They reach the page as text
// nodes only, never as HTML.

export const $ = (id) => document.getElementById(id);

/** A new element with a class and children (elements or texts). */
export function element(tag, className = '', ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children);
  return made;
}
export const copyOf = (template) => $(template).content.firstElementChild.cloneNode(true);
export const number = (value, digits = 0) => value.toLocaleString('en', { minimumFractionDigits: digits, maximumFractionDigits: digits });
export const touch = matchMedia('(pointer: coarse)');
export const narrow = matchMedia('(max-width: 52rem)');

/** Tells people who use a screen reader; without a text, forgets what was said. */
export function say(words) {
  if (words === undefined) $('live').replaceChildren();
  else if (words.trim()) $('live').append(element('p', '', words.replace(/[*`#]/g, '').trim()));
}

export function notice(words, again) {
  $('notice').hidden = !words;
  $('notice').firstElementChild.textContent = words;
  $('notice-again').hidden = !again;
  $('notice-again').onclick = () => {
    notice('');
    again();
  };
}

export function copyButton(what, button = element('button', 'copy', 'Copy')) {
  button.type = 'button';
  // Browsers give the clipboard to pages from this machine or over TLS only.
  button.hidden = !navigator.clipboard;
  button.onclick = async () => {
    const done = await navigator.clipboard.writeText(what()).then(() => 'Copied', () => 'Not copied');
    button.textContent = done;
    say(done);
    setTimeout(() => (button.textContent = 'Copy'), 1500);
  };
  return button;
}

/** Makes a field as high as its text. */
export function fit(field) {
  // Without a scroll bar, which would make the lines shorter.
  field.style.overflow = 'hidden';
  field.style.height = 'auto';
  field.style.height = `${field.scrollHeight + field.offsetHeight - field.clientHeight}px`;
  field.style.overflow = field.scrollHeight > field.clientHeight ? 'auto' : 'hidden';
}

export function openSide() {
  $('side').classList.add('open');
  $('shade').hidden = false;
  $('main').inert = true;
  $('menu').setAttribute('aria-expanded', 'true');
  $('new').focus();
}

export function closeSide() {
  if (!$('side').classList.contains('open')) return;
  $('side').classList.remove('open');
  $('shade').hidden = true;
  $('main').inert = false;
  $('menu').setAttribute('aria-expanded', 'false');
  $('menu').focus();
}
