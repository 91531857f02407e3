// The page's texts in the reader's language. A language's file is read when it is wanted.

const LANGUAGES = ["en", "ja", "zh"];
const NAME = "exo-kimi.language";
export const NAMES = { en: "English", ja: "日本語", zh: "中文" };

/** The chosen language, else the browser's, else English. */
export function language() {
  const chosen = localStorage.getItem(NAME);
  if (LANGUAGES.includes(chosen)) return chosen;
  const wished = navigator.languages.map((tag) => tag.slice(0, 2));
  return wished.find((tag) => LANGUAGES.includes(tag)) ?? "en";
}

export function chooseLanguage(tag) {
  localStorage.setItem(NAME, tag);
}

export async function words() {
  const tag = language();
  document.documentElement.lang = tag;
  return (await import(`/page/words/${tag}.js`)).default;
}
